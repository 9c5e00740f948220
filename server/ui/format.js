// Numbers and times as people read them.

const whole = new Intl.NumberFormat("en");

export const count = (n) => whole.format(Math.round(n));

/** 1234 -> "1.2k"; for places where the exact figure does not matter. */
export function short(n) {
  if (n < 1000) return n < 10 && n % 1 ? n.toFixed(1) : String(Math.round(n));
  if (n < 1e6) return `${trim(n / 1e3)}k`;
  return `${trim(n / 1e6)}M`;
}

const trim = (n) => (n < 10 ? n.toFixed(1) : String(Math.round(n)));

/** 0.0123 -> "12 ms", 75 -> "1 min 15 s". */
export function duration(seconds) {
  if (seconds < 0.001) return seconds > 0 ? `${Math.round(seconds * 1e6)} µs` : "0 s";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
}

export const percent = (share) => `${Math.round(share * 100)} %`;

export const plural = (n, word, words = `${word}s`) => `${count(n)} ${n === 1 ? word : words}`;

/** "chatcmpl-0123456789abcdef" -> "chatcmpl-01234567": enough to tell requests apart. */
export const shortId = (id) => id.replace(/^((?:chatcmpl|cmpl)-.{8}).*$/, "$1");
