"use strict";
// Light or dark: the system's wish, unless the reader chose. Other parts redraw on the event "kvp-theme".
const Theme = (() => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const names = ["auto", "light", "dark"];
  let chosen = "auto";
  try { chosen = names.find((x) => x === localStorage.getItem("kvp-theme")) || "auto"; } catch { /* no storage here */ }
  const resolved = () => (chosen === "auto" ? (dark.matches ? "dark" : "light") : chosen);
  function show(name = resolved()) {
    document.documentElement.dataset.theme = name;
    document.getElementById("theme").textContent = `Theme: ${chosen}`;
    document.dispatchEvent(new Event("kvp-theme"));
  }
  function next() {
    chosen = names[(names.indexOf(chosen) + 1) % names.length];
    try { localStorage.setItem("kvp-theme", chosen); } catch { /* stays for this visit */ }
    show();
  }
  dark.addEventListener("change", () => show());
  document.getElementById("theme").addEventListener("click", next);
  window.addEventListener("beforeprint", () => show("light"));
  window.addEventListener("afterprint", () => show());
  show();
  return { next };
})();
