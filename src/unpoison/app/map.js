// The map: points from binary columns, drawn into the pixels of a canvas. A selection is a bit for each point;
// the lasso is filled once on a hidden canvas and every point looks its own pixel up, so that what is selected
// is what is seen, at a cost that depends on the number of points alone.
const LIGHT = [0xffe3dfdb, 0xffcfc8c0, 0xff9c8f83];
// Okabe and Ito's palette, darkened to be told from white; more classes than that share colours.
const PALETTE = ["#0072b2", "#d55e00", "#007a5a", "#a8327c", "#5b4a00", "#3a8fc4", "#b07c00", "#3b3b3b", "#7a5195", "#8f1d14"];
const VERDICT = ["#8793a0", "#8f1d14", "#0b5d8a", "#b07c00"];

const abgr = (hex) => {
  const value = parseInt(hex.slice(1), 16);
  return (0xff000000 | ((value & 255) << 16) | (value & 0xff00) | (value >> 16)) >>> 0;
};

export default {
  template: `
    <div class="map">
      <canvas ref="canvas" tabindex="0" role="application" :aria-label="label"
        @pointerdown="down" @pointermove="move" @pointerup="up" @pointercancel="up" @wheel.prevent="wheel"
        @keydown="key"></canvas>
      <canvas ref="over" class="over" aria-hidden="true"></canvas>
      <p class="status-line" role="status">{{ said }}</p>
    </div>`,
  props: { count: Number, colour: String, search: String, label: String, lasso: Boolean, names: Array },
  data: () => ({ said: "loading ..." }),
  async mounted() {
    window.map = this; // for the buttons beside it
    this.chosen = new Uint8Array(this.count);
    this.selected = 0;
    this.view = { x: 0, y: 0, scale: 1 };
    this.columns = {};
    this.times = {};
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(this.$refs.canvas.parentElement);
    await this.load();
  },
  unmounted() {
    this.observer.disconnect();
    cancelAnimationFrame(this.frame);
  },
  watch: {
    colour() {
      this.paint();
    },
  },
  methods: {
    async column(name, type) {
      const answer = await fetch(`/column/${name}?search=${encodeURIComponent(this.search)}`);
      return answer.ok ? new type(await answer.arrayBuffer()) : null;
    },
    async load() {
      const plane = await this.column("plane", Float32Array);
      if (!plane) {
        this.said = "The map is being made ...";
        return;
      }
      const [label, score, decision] = await Promise.all([
        this.column("label", Uint16Array), this.column("score", Float32Array), this.column("decision", Uint8Array),
      ]);
      this.columns = { plane, label, score, decision };
      this.whole();
      this.centre();
      await this.paint();
      this.tell();
      this.$emit("loaded");
    },
    async decided() {
      if (!this.columns.plane) return;
      this.columns.decision = await this.column("decision", Uint8Array);
      await this.paint();
    },
    whole() {
      const p = this.columns.plane;
      const bounds = [Infinity, Infinity, -Infinity, -Infinity];
      for (let i = 0; i < p.length; i += 2) {
        if (p[i] < bounds[0]) bounds[0] = p[i];
        if (p[i + 1] < bounds[1]) bounds[1] = p[i + 1];
        if (p[i] > bounds[2]) bounds[2] = p[i];
        if (p[i + 1] > bounds[3]) bounds[3] = p[i + 1];
      }
      this.bounds = bounds;
      this.fit();
    },
    // The mean of the points of each class; of few classes alone, or the names would hide the points.
    centre() {
      const { plane, label } = this.columns;
      const sums = this.names.map(() => [0, 0, 0]);
      if (this.names.length <= 20)
        for (let i = 0; i < label.length; i++) {
          const sum = sums[label[i]];
          sum[0] += plane[2 * i];
          sum[1] += plane[2 * i + 1];
          sum[2]++;
        }
      this.middles = new Map();
      sums.forEach(([x, y, n], one) => n && this.middles.set(one, [x / n, y / n]));
    },
    fit() {
      if (!this.columns.plane) return;
      const [w, h] = [this.$refs.canvas.width, this.$refs.canvas.height];
      const [a, b, c, d] = this.bounds;
      const scale = 0.94 * Math.min(w / Math.max(c - a, 1e-9), h / Math.max(d - b, 1e-9));
      this.view = { x: w / 2 - (scale * (a + c)) / 2, y: h / 2 + (scale * (b + d)) / 2, scale };
    },
    resize() {
      const canvas = this.$refs.canvas;
      const box = canvas.parentElement.getBoundingClientRect();
      const ratio = (this.ratio = Math.min(window.devicePixelRatio || 1, 2));
      const [w, h] = [Math.round(box.width * ratio), Math.round(canvas.clientHeight * ratio)];
      if (!w || !h || (canvas.width === w && canvas.height === h)) return;
      for (const one of [canvas, this.$refs.over]) [one.width, one.height] = [w, h];
      this.pixels = null;
      if (this.columns.plane) {
        this.fit();
        this.draw();
      }
    },
    // Colours of all points and the order to draw them in: the pale ones first.
    async paint() {
      const { label, score, decision } = this.columns;
      if (!label) return;
      const n = this.count;
      const colours = new Uint32Array(n);
      if (this.colour === "decision") {
        const table = VERDICT.map(abgr);
        for (let i = 0; i < n; i++) colours[i] = table[decision[i]];
      } else if (this.colour === "score" && score) {
        const sorted = Float32Array.from(score).sort();
        const [low, high] = [sorted[Math.floor(n * 0.5)], sorted[Math.floor(n * 0.995)]];
        for (let i = 0; i < n; i++) {
          const t = Math.min(1, Math.max(0, (score[i] - low) / (high - low || 1)));
          const [r, g, b] = [0x87 + t * 0x08, 0x93 - t * 0x76, 0xa0 - t * 0x8c].map(Math.round);
          colours[i] = (0xff000000 | (b << 16) | (g << 8) | r) >>> 0;
        }
      } else {
        const table = PALETTE.map(abgr);
        for (let i = 0; i < n; i++) colours[i] = table[label[i] % table.length];
      }
      this.colours = colours;
      this.draw();
    },
    draw() {
      if (this.frame) return;
      this.frame = requestAnimationFrame(() => {
        this.frame = 0;
        this.render();
      });
    },
    render() {
      const canvas = this.$refs.canvas;
      if (!canvas || !this.columns.plane || !canvas.width) return;
      const start = performance.now();
      const [w, h] = [canvas.width, canvas.height];
      const context = canvas.getContext("2d", { alpha: false });
      if (!this.pixels) {
        this.image = context.createImageData(w, h);
        this.pixels = new Uint32Array(this.image.data.buffer);
      }
      const { pixels, colours, chosen } = this;
      const p = this.columns.plane;
      const count = p.length >> 1;
      const { x, y, scale } = this.view;
      pixels.fill(0xffffffff);
      const size = count > 200000 ? 1 : count > 20000 ? 2 : 3;
      const some = this.selected > 0;
      const put = (i, side, colour) => {
        const a = (x + p[2 * i] * scale) | 0;
        const b = (y - p[2 * i + 1] * scale) | 0;
        if (a < 0 || b < 0 || a + side > w || b + side > h) return;
        for (let row = b * w + a, end = row + side * w; row < end; row += w)
          for (let at = row; at < row + side; at++) pixels[at] = colour;
      };
      if (size === 1) {
        for (let i = 0; i < count; i++) {
          const a = (x + p[2 * i] * scale) | 0;
          const b = (y - p[2 * i + 1] * scale) | 0;
          if (a >= 0 && b >= 0 && a < w && b < h) pixels[b * w + a] = some && !chosen[i] ? LIGHT[1] : colours[i];
        }
      } else {
        for (let i = 0; i < count; i++) put(i, size, some && !chosen[i] ? LIGHT[1] : colours[i]);
      }
      if (some) for (let i = 0; i < count; i++) if (chosen[i]) put(i, size + 1, colours[i]);
      if (this.colour === "decision") {
        const { decision } = this.columns;
        for (let i = 0; i < count; i++) if (decision[i]) this.mark(i, decision[i], colours[i]);
      }
      context.putImageData(this.image, 0, 0);
      if (this.colour === "label") this.write(context);
      this.times.render = performance.now() - start;
    },
    // Decisions differ by shape as well as by colour: blamed a square, cleared a ring, unsure a cross.
    mark(i, verdict, colour) {
      const { width: w, height: h } = this.$refs.canvas;
      const p = this.columns.plane;
      const r = this.count > 20000 ? 3 : 4;
      const a = Math.floor(this.view.x + p[2 * i] * this.view.scale);
      const b = Math.floor(this.view.y - p[2 * i + 1] * this.view.scale);
      if (a < r || b < r || a >= w - r || b >= h - r) return;
      for (let dy = -r; dy <= r; dy++)
        for (let dx = -r; dx <= r; dx++) {
          const away = Math.hypot(dx, dy);
          let on = Math.abs(dx) < r && Math.abs(dy) < r;
          if (verdict === 2) on = away > r - 1.8 && away < r + 0.5;
          if (verdict === 3) on = dx === dy || dx === -dy || dx === dy + 1 || dx === 1 - dy;
          if (on || verdict > 1) this.pixels[(b + dy) * w + a + dx] = on ? colour : 0xffffffff;
        }
    },
    // The names of the classes where their points lie, so that nobody depends on the colours.
    write(context) {
      context.font = `600 ${13 * this.ratio}px system-ui, "Liberation Sans", Arial, sans-serif`;
      context.textAlign = "center";
      context.lineWidth = 4 * this.ratio;
      context.lineJoin = "round";
      const placed = [];
      for (const [label, [x, y]] of [...this.middles].sort((one, other) => other[1][1] - one[1][1])) {
        const half = context.measureText(this.names[label]).width / 2;
        const [a, line] = [this.view.x + x * this.view.scale, 16 * this.ratio];
        let b = this.view.y - y * this.view.scale;
        for (const [left, right, at] of placed)
          if (a - half < right && a + half > left && Math.abs(b - at) < line) b = at + line;
        placed.push([a - half, a + half, b]);
        context.strokeStyle = "#ffffff";
        context.strokeText(this.names[label], a, b);
        context.fillStyle = "#1d2126";
        context.fillText(this.names[label], a, b);
      }
    },
    point(event) {
      const box = this.$refs.canvas.getBoundingClientRect();
      const ratio = this.$refs.canvas.width / box.width;
      return [(event.clientX - box.left) * ratio, (event.clientY - box.top) * ratio];
    },
    down(event) {
      if (event.button) return;
      this.$refs.canvas.setPointerCapture(event.pointerId);
      const at = this.point(event);
      if (this.lasso && !event.shiftKey) this.line = [at];
      else this.held = at;
    },
    move(event) {
      const at = this.point(event);
      if (this.line) {
        this.line.push(at);
        const context = this.$refs.over.getContext("2d");
        context.clearRect(0, 0, this.$refs.over.width, this.$refs.over.height);
        this.trace(context, this.line);
        context.lineWidth = 2;
        context.strokeStyle = "#1d2126";
        context.setLineDash([6, 4]);
        context.stroke();
      } else if (this.held) {
        this.view.x += at[0] - this.held[0];
        this.view.y += at[1] - this.held[1];
        this.held = at;
        this.draw();
      }
    },
    up() {
      this.held = null;
      if (!this.line) return;
      const line = this.line;
      this.line = null;
      this.$refs.over.getContext("2d").clearRect(0, 0, this.$refs.over.width, this.$refs.over.height);
      if (line.length > 2) this.select(line);
      else this.clear();
    },
    trace(context, line) {
      context.beginPath();
      line.forEach(([a, b], i) => (i ? context.lineTo(a, b) : context.moveTo(a, b)));
      context.closePath();
    },
    select(line) {
      if (!this.columns.plane) return;
      const start = performance.now();
      const [w, h] = [this.$refs.canvas.width, this.$refs.canvas.height];
      const hidden = new OffscreenCanvas(w, h);
      const context = hidden.getContext("2d", { willReadFrequently: true });
      this.trace(context, line);
      context.fill("evenodd");
      const inside = new Uint32Array(context.getImageData(0, 0, w, h).data.buffer);
      const p = this.columns.plane;
      const { x, y, scale } = this.view;
      let selected = 0;
      for (let i = 0; i < this.count; i++) {
        const a = (x + p[2 * i] * scale) | 0;
        const b = (y - p[2 * i + 1] * scale) | 0;
        const hit = a >= 0 && b >= 0 && a < w && b < h && inside[b * w + a] > 0x80000000 ? 1 : 0;
        this.chosen[i] = hit;
        selected += hit;
      }
      this.selected = selected;
      this.render();
      this.times.lasso = performance.now() - start;
      this.tell();
    },
    all() {
      this.fit();
      this.draw();
    },
    visible() {
      const [w, h] = [this.$refs.canvas.width, this.$refs.canvas.height];
      this.select([[0, 0], [w, 0], [w, h], [0, h]]);
    },
    clear() {
      this.chosen.fill(0);
      this.selected = 0;
      this.draw();
      this.tell();
    },
    tell() {
      const shown = [];
      for (let i = 0; i < this.count && shown.length < 24; i++) if (this.chosen[i]) shown.push(i);
      const share = ((100 * this.selected) / Math.max(1, this.count)).toFixed(1);
      this.said = this.selected
        ? `${this.selected.toLocaleString("en")} of ${this.count.toLocaleString("en")} points are selected (${share} %)`
        : `${this.count.toLocaleString("en")} points, none selected`;
      this.$emit("selected", { count: this.selected, shown });
    },
    // What is decided here goes to the server in the order of the keys, one request after the other.
    decide(verdict) {
      if (!this.selected) return this.pending;
      const bits = new Uint8Array((this.count + 7) >> 3);
      for (let i = 0; i < this.count; i++) if (this.chosen[i]) bits[i >> 3] |= 1 << (i & 7);
      return this.ask(`/decide/${verdict}`, bits);
    },
    ask(address, body) {
      this.pending = Promise.resolve(this.pending).then(async () => {
        const start = performance.now();
        const answer = await fetch(address, { method: "POST", body });
        this.times.decide = performance.now() - start;
        if (!answer.ok) this.said = `The server refused this: ${await answer.text()}`;
      });
      return this.pending;
    },
    zoom(by, at) {
      const [w, h] = [this.$refs.canvas.width, this.$refs.canvas.height];
      const [a, b] = at || [w / 2, h / 2];
      this.view = { x: a + (this.view.x - a) * by, y: b + (this.view.y - b) * by, scale: this.view.scale * by };
      this.draw();
    },
    pan(dx, dy) {
      this.view.x += dx * this.$refs.canvas.width;
      this.view.y += dy * this.$refs.canvas.height;
      this.draw();
    },
    wheel(event) {
      this.zoom(Math.exp(-event.deltaY / 400), this.point(event));
    },
    key(event) {
      const step = { ArrowLeft: [0.1, 0], ArrowRight: [-0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] }[event.key];
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (step) this.pan(...step);
      else if (event.key === "+" || event.key === "=") this.zoom(1.25);
      else if (event.key === "-") this.zoom(0.8);
      else if (event.key === "0") this.all();
      else if (event.key === "Escape") this.clear();
      else if (event.key !== "Tab") {
        // The buttons' keys hold on the canvas as well.
        const pressed = [...document.querySelectorAll("[aria-keyshortcuts]")].find((element) =>
          element.getAttribute("aria-keyshortcuts").split(" ").includes(event.key));
        if (!pressed) return;
        pressed.click();
      } else return;
      event.preventDefault();
    },
    // Frames a second while panning, for the measurement in docs/app.md.
    async measure(frames) {
      const start = performance.now();
      for (let i = 0; i < frames; i++) {
        this.view.x += i % 2 ? 5 : -5;
        await new Promise(requestAnimationFrame);
        this.render();
      }
      return (1000 * frames) / (performance.now() - start);
    },
  },
};
