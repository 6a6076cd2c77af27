// Draws the figures in the page's colours, and again when these change.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const LIGHT = { ink: "#1c2026", grid: "#e3e6eb", line: "#9aa2ad", hover: "#ffffff" };
  const DARK = { ink: "#e6e9ed", grid: "#2c323a", line: "#69727e", hover: "#262b33" };

  function painted(layout, colours) {
    const changes = {
      "font.color": colours.ink,
      "hoverlabel.bgcolor": colours.hover,
      "hoverlabel.font.color": colours.ink,
      "modebar.bgcolor": "rgba(0,0,0,0)",
      "modebar.color": colours.line,
      "modebar.activecolor": colours.ink,
    };
    for (const name of Object.keys(layout)) {
      if (!/^[xy]axis\d*$/.test(name)) continue;
      changes[name + ".gridcolor"] = colours.grid;
      changes[name + ".linecolor"] = colours.line;
      changes[name + ".tickcolor"] = colours.line;
    }
    return changes;
  }

  function saved(node, format) {
    // A file for a paper: the light face, on white, whatever the page shows now.
    const layout = JSON.parse(JSON.stringify(node.layout));
    for (const [path, value] of Object.entries(painted(layout, LIGHT))) {
      const keys = path.split(".");
      let at = layout;
      for (const key of keys.slice(0, -1)) at = at[key] = at[key] || {};
      at[keys[keys.length - 1]] = value;
    }
    layout.paper_bgcolor = "#ffffff";
    Plotly.downloadImage({ data: node.data, layout }, {
      format, filename: node.dataset.figure, width: 900, height: node.layout.height || 450,
      scale: format === "png" ? 2 : 1,
    });
  }

  const camera = (format) => ({
    name: "Save as " + format.toUpperCase(),
    icon: Plotly.Icons[format === "png" ? "camera" : "disk"],
    click: (node) => saved(node, format),
  });
  const config = {
    responsive: true,
    displaylogo: false,
    modeBarButtonsToRemove: ["toImage", "select2d", "lasso2d", "autoScale2d"],
    modeBarButtonsToAdd: [camera("png"), camera("svg")],
  };

  const nodes = [...document.querySelectorAll("[data-figure]")];
  const paint = (colours) =>
    Promise.all(nodes.map((node) => Plotly.relayout(node, painted(node.layout, colours))));
  const current = () => (dark.matches ? DARK : LIGHT);

  async function draw() {
    for (const node of nodes) {
      const figure = JSON.parse(document.getElementById("figure-" + node.dataset.figure).textContent);
      if (node.clientWidth < 520) {
        figure.layout.font.size = 11;
        figure.layout.margin = { ...figure.layout.margin, l: 44, r: 8 };
      }
      await Plotly.newPlot(node, figure.data, figure.layout, config);
    }
    await paint(current());
    document.documentElement.dataset.drawn = nodes.length;
  }

  draw();
  dark.addEventListener("change", () => paint(current()));
  addEventListener("beforeprint", () => paint(LIGHT));
  addEventListener("afterprint", () => paint(current()));
})();
