// Numbers for people, as `pyforwarder top` writes them.

/** Bytes: `1023 B`, `1.5 KiB`, `12.3 GiB`. */
export function size(count) {
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (count < 1000) {
      const digits = unit === "B" || count >= 100 ? 0 : 1;
      return `${count.toFixed(digits)} ${unit}`;
    }
    count /= 1024;
  }
  return `${count.toFixed(1)} TiB`;
}

/** Bytes per second; a dash for none, so that what moves stands out. */
export function rate(perSecond) {
  return perSecond < 0.5 ? "–" : `${size(perSecond)}/s`;
}

/** Events per second; a dash for none. */
export function events(perSecond) {
  if (perSecond <= 0) return "–";
  return `${perSecond >= 100 ? grouped(Math.round(perSecond)) : perSecond.toFixed(1)}/s`;
}

/** A count, its thousands apart. */
export function grouped(count) {
  return String(count).replace(/\B(?=(\d{3})+(?!\d))/g, " ");
}

/** Seconds: `59s`, `59m03s`, `23h59m`, `12d03h`. */
export function age(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  const two = (number) => String(number).padStart(2, "0");
  const minutes = Math.floor(whole / 60);
  const hours = Math.floor(minutes / 60);
  const days = Math.floor(hours / 24);
  if (days) return `${days}d${two(hours % 24)}h`;
  if (hours) return `${hours}h${two(minutes % 60)}m`;
  if (minutes) return `${minutes}m${two(whole % 60)}s`;
  return `${whole}s`;
}

/** A moment of this viewer's day, from seconds since 1970. */
export function moment(unixSeconds) {
  const when = new Date(unixSeconds * 1000);
  const two = (number) => String(number).padStart(2, "0");
  const day = `${when.getFullYear()}-${two(when.getMonth() + 1)}-${two(when.getDate())}`;
  return `${day} ${two(when.getHours())}:${two(when.getMinutes())}:${two(when.getSeconds())}`;
}
