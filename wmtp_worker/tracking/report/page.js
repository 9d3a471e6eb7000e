// The values under the pointer. All that the page says is there without it.
"use strict";
for (const plot of document.querySelectorAll(".plot")) {
  const [x0, x1, y0, y1] = plot.dataset.domain.split(" ").map(Number);
  const share = plot.dataset.share === "1";
  const svg = plot.querySelector("svg");
  const lines = [...svg.querySelectorAll("[data-name]:not(.bars):not(.dashed)")].map((path) => ({
    name: path.dataset.name,
    points: path.getAttribute("d").split(/[ML]/).slice(1).map((point) => point.split(/[ h]/, 2).map(Number)),
  }));
  if (!lines.length) continue;
  const round = (value, range) => Number(value.toFixed(Math.max(0, Math.ceil(2 - Math.log10(range)))));
  const sayX = (value) => round(value, (x1 - x0) / 10).toLocaleString("en");
  const sayY = (value) => (share ? `${round(100 * value, 10)}%` : round(value, y1 - y0).toLocaleString("en", { maximumSignificantDigits: 5 }));
  let cursor, tip;
  const leave = () => {
    cursor?.remove();
    tip?.remove();
    cursor = tip = undefined;
  };
  plot.addEventListener("pointerleave", leave);
  plot.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = (1000 * (event.clientX - box.left)) / box.width;
    if (at < 0 || at > 1000) return leave();
    const near = lines.map((line) => line.points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a)));
    const x = near.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a))[0];
    if (!cursor) {
      cursor = plot.appendChild(Object.assign(document.createElement("div"), { className: "cursor" }));
      tip = plot.appendChild(Object.assign(document.createElement("div"), { className: "tip" }));
    }
    cursor.style.left = `${x / 10}%`;
    tip.replaceChildren(`${plot.dataset.x} ${sayX(x0 + (x / 1000) * (x1 - x0))}`);
    near.forEach(([, y], i) => tip.append(document.createElement("br"), `${lines[i].name} ${sayY(y0 + (1 - y / 1000) * (y1 - y0))}`));
    const right = x > 500;
    tip.style.left = right ? "" : `calc(${x / 10}% + 0.6rem)`;
    tip.style.right = right ? `calc(${100 - x / 10}% + 0.6rem)` : "";
  });
}
