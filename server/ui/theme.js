// Light, dark, or as the system says. The choice stays in this browser.

import { $, setText } from "./dom.js";

const KEY = "quire-theme";
const NAMES = { auto: "Auto", light: "Light", dark: "Dark" };
const NEXT = { auto: "light", light: "dark", dark: "auto" };
const system = matchMedia("(prefers-color-scheme: dark)");
const listeners = [];

export const onTheme = (listener) => listeners.push(listener);

const chosen = () => (localStorage.getItem(KEY) in NAMES ? localStorage.getItem(KEY) : "auto");

export function applyTheme() {
  const choice = chosen();
  document.documentElement.dataset.theme = choice === "auto" ? (system.matches ? "dark" : "light") : choice;
  setText($("theme"), NAMES[choice]);
  $("theme").setAttribute("aria-label", `Theme: ${choice === "auto" ? "as the system" : choice}`);
  for (const listener of listeners) listener();
}

$("theme").addEventListener("click", () => {
  localStorage.setItem(KEY, NEXT[chosen()]);
  applyTheme();
});
system.addEventListener("change", applyTheme);
