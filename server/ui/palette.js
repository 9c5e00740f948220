// The page's colours for the canvas: read from the style sheet, packed as the pixels of an ImageData.

const scratch = Object.assign(document.createElement("canvas"), { width: 1, height: 1 })
  .getContext("2d", { willReadFrequently: true });

/** Any CSS colour -> 0xAABBGGRR, as a little-endian pixel. */
export function pixel(css) {
  scratch.clearRect(0, 0, 1, 1);
  scratch.fillStyle = css;
  scratch.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = scratch.getImageData(0, 0, 1, 1).data;
  return ((a << 24) | (b << 16) | (g << 8) | r) >>> 0;
}

export const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** `share` of 256 on the way from one pixel to another. */
export function mix(from, to, share) {
  const keep = 256 - share;
  const redBlue = (((from & 0xff00ff) * keep + (to & 0xff00ff) * share) >>> 8) & 0xff00ff;
  const green = (((from & 0x00ff00) * keep + (to & 0x00ff00) * share) >>> 8) & 0x00ff00;
  return (0xff000000 | redBlue | green) >>> 0;
}

const HUES = 24;

/** The same number has the same colour, today and on every machine. Neighbours differ well. */
export const hueOf = (number) => Math.imul(number + 1, 0x9e3779b1) >>> 0;

export const hueCss = (number) => {
  const at = hueOf(number);
  return `oklch(${at & 256 ? variable("--hue-light") : variable("--hue-dark")} 0.13 ${((at >>> 9) % HUES) * (360 / HUES)})`;
};

/** Everything the atlas paints with, for the theme of this moment. */
export function palette() {
  const states = ["--free", "--cached", "--in-use", "--shared"].map((name) => pixel(variable(name)));
  const ground = pixel(variable("--panel"));
  const hues = [];
  for (let shade = 0; shade < 2; shade++)
    for (let hue = 0; hue < HUES; hue++)
      hues.push(pixel(`oklch(${variable(shade ? "--hue-light" : "--hue-dark")} 0.13 ${hue * (360 / HUES)})`));
  const ages = Array.from({ length: 65 }, (_, step) => pixel(`color-mix(in oklab, ${variable("--age-new")}, ${variable("--age-old")} ${(step / 64) * 100}%)`));
  return {
    states, ground, hues, ages,
    hue: (number) => {
      const at = hueOf(number);
      return hues[(at & 256 ? HUES : 0) + ((at >>> 9) % HUES)];
    },
    flashes: [0, pixel(variable("--flash-taken")), pixel(variable("--flash-reused")), pixel(variable("--flash-evicted"))],
    line: variable("--text"), accent: variable("--accent"), panel: variable("--panel"),
  };
}
