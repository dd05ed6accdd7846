// The page's script: draws the GLB in MODEL with three.js. FACTS: unit and per_unit of the ruler.
"use strict";
(() => {
const get = (id) => document.getElementById(id);
const canvas = document.querySelector("canvas");
const sight = {turn: 0, rise: 0.29, distance: 1, target: new THREE.Vector3(), radius: 1};
let renderer, scene, camera, lamp, light, object, materials, wires, line, points = [];

async function unpacked(text) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return await new Response(stream).arrayBuffer();
}

async function start() {
    renderer = new THREE.WebGLRenderer({canvas, antialias: true});
    renderer.outputEncoding = THREE.sRGBEncoding;
    scene = new THREE.Scene();
    scene.background = new THREE.Color(0xffffff);
    camera = new THREE.PerspectiveCamera(40, 1, 0.01, 100);
    lamp = new THREE.DirectionalLight(0xffffff, 0.85);
    scene.add(lamp, lamp.target, new THREE.HemisphereLight(0xffffff, 0x777777, 0.4));
    const model = await unpacked(MODEL);
    const gltf = await new Promise((done, failed) => new THREE.GLTFLoader().parse(model, "", done, failed));
    gltf.scene.traverse((node) => {
        if (node.isMesh) object = node;
        if (node.isDirectionalLight) light = node;      // whose highlights belong to the colours
    });
    if (light) light.intensity /= Math.PI;              // three.js multiplies by pi
    prepare();
    scene.add(gltf.scene);
    home();
    for (const [name, act] of Object.entries(mouse)) canvas.addEventListener(name, act, {passive: false});
    canvas.addEventListener("keydown", key);
    for (const id of ["light", "turn", "clay", "wire", "ruler"]) get(id).addEventListener("input", choose);
    addEventListener("resize", draw);
    choose();
    document.body.dataset.drawn = "yes";
}

function prepare() {
    const geometry = object.geometry, given = object.material;
    geometry.computeBoundingSphere();
    const map = given.map || given.emissiveMap || null;
    const colored = {map, vertexColors: !!geometry.attributes.color};
    const shape = {roughness: 0.75, metalness: 0, normalMap: given.normalMap || null,
                   normalScale: given.normalScale ? given.normalScale.clone() : new THREE.Vector2(1, 1)};
    if (map) map.anisotropy = renderer.capabilities.getMaxAnisotropy();
    materials = {plain: light ? given : new THREE.MeshBasicMaterial(colored), lit: new THREE.MeshStandardMaterial({...colored, ...shape}),
                 clay: new THREE.MeshStandardMaterial({color: 0xc8c4bc, ...shape})};
    // Faces step back a little, so that the wires before them are whole.
    for (const material of Object.values(materials)) {
        Object.assign(material, {polygonOffset: true, polygonOffsetFactor: 1, polygonOffsetUnits: 1});
    }
    line = new THREE.Line(new THREE.BufferGeometry(), new THREE.LineBasicMaterial({color: 0xd02020, depthTest: false}));
    line.renderOrder = 1;
    line.frustumCulled = false;
    scene.add(line);
}

function home() {
    const sphere = object.geometry.boundingSphere;
    sight.target.copy(sphere.center);
    sight.radius = sphere.radius;
    Object.assign(sight, {turn: 0, rise: 0.29, distance: 2.9 * sphere.radius});
}

function choose() {
    const lit = get("light").checked, clay = get("clay").checked;
    object.material = clay ? materials.clay : lit ? materials.lit : materials.plain;
    get("turn").disabled = !(lit || clay);
    lamp.visible = lit || clay;
    if (light) light.visible = !lamp.visible;
    if (get("wire").checked && !wires) {
        wires = new THREE.LineSegments(new THREE.WireframeGeometry(object.geometry),
                                       new THREE.LineBasicMaterial({color: 0x202020, transparent: true, opacity: 0.45}));
        object.add(wires);
    }
    if (wires) wires.visible = get("wire").checked;
    canvas.classList.toggle("measuring", get("ruler").checked);
    if (!get("ruler").checked) points = [];
    draw();
}

function draw() {
    const width = innerWidth, height = viewHeight(), flat = Math.cos(sight.rise);
    renderer.setPixelRatio(devicePixelRatio);
    renderer.setSize(width, height);
    camera.aspect = width / height;
    // The view is as wide as it is high at least, also on an upright screen.
    camera.fov = 2 * Math.atan(Math.tan(Math.PI / 9) / Math.min(camera.aspect, 1)) * 180 / Math.PI;
    camera.near = Math.max(sight.distance - 4 * sight.radius, sight.distance / 1000);
    camera.far = sight.distance + 4 * sight.radius;
    camera.updateProjectionMatrix();
    camera.position.set(flat * Math.sin(sight.turn), Math.sin(sight.rise), flat * Math.cos(sight.turn))
        .multiplyScalar(sight.distance).add(sight.target);
    camera.lookAt(sight.target);
    const towards = sight.turn + get("turn").value * Math.PI / 180;
    lamp.target.position.copy(sight.target);
    lamp.position.set(Math.sin(towards), 0.8, Math.cos(towards)).add(sight.target);
    line.geometry.setFromPoints(points);
    renderer.render(scene, camera);
    label();
}

function viewHeight() { return Math.max(innerHeight - get("tools").offsetHeight, 1); }

// --- the mouse, fingers and keys ---

const fingers = new Map();
const mouse = {
    pointerdown(event) {
        canvas.focus();
        canvas.setPointerCapture(event.pointerId);
        fingers.set(event.pointerId, {x: event.clientX, y: event.clientY, from: [event.clientX, event.clientY]});
    },
    pointermove(event) {
        const finger = fingers.get(event.pointerId);
        if (!finger) return;
        const dx = event.clientX - finger.x, dy = event.clientY - finger.y;
        const other = [...fingers.values()].find((one) => one !== finger);
        if (other) {
            const apart = (x, y) => Math.hypot(x - other.x, y - other.y);
            zoom(apart(finger.x, finger.y) / Math.max(apart(event.clientX, event.clientY), 1));
            move(dx / 2, dy / 2);
        } else if (event.buttons === 2 || event.shiftKey) {
            move(dx, dy);
        } else {
            sight.turn -= dx * 0.008;
            sight.rise = Math.min(Math.max(sight.rise + dy * 0.008, -1.55), 1.55);
        }
        Object.assign(finger, {x: event.clientX, y: event.clientY});
        draw();
    },
    pointerup(event) {
        const finger = fingers.get(event.pointerId);
        fingers.delete(event.pointerId);
        if (finger && Math.hypot(event.clientX - finger.from[0], event.clientY - finger.from[1]) < 4) click(event);
    },
    pointercancel(event) { fingers.delete(event.pointerId); },
    wheel(event) { event.preventDefault(); zoom(Math.exp(Math.sign(event.deltaY) * 0.12)); draw(); },
    contextmenu(event) { event.preventDefault(); },
    dblclick() { if (!get("ruler").checked) { home(); draw(); } },
};

function key(event) {
    const step = {ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1]}[event.key];
    if (step) {
        sight.turn += step[0];
        sight.rise = Math.min(Math.max(sight.rise + step[1], -1.55), 1.55);
    } else if (event.key === "+" || event.key === "-") {
        zoom(event.key === "+" ? 0.9 : 1.1);
    } else return;
    event.preventDefault();
    draw();
}

function zoom(factor) {
    sight.distance = Math.min(Math.max(sight.distance * factor, 0.02 * sight.radius), 20 * sight.radius);
}

function move(dx, dy) {
    const size = pixel();
    sight.target.add(new THREE.Vector3(-dx * size, dy * size, 0).applyQuaternion(camera.quaternion));
}

function pixel() {      // the size of a pixel at the target
    return 2 * sight.distance * Math.tan(camera.fov * Math.PI / 360) / viewHeight();
}

// --- the ruler ---

function click(event) {
    if (!get("ruler").checked) return;
    const place = new THREE.Vector2(2 * event.clientX / innerWidth - 1, 1 - 2 * event.clientY / viewHeight());
    const caster = new THREE.Raycaster();
    caster.setFromCamera(place, camera);
    const hits = caster.intersectObject(object, false);
    if (hits.length) points = points.length === 1 ? [points[0], hits[0].point] : [hits[0].point];
    draw();
}

function says(length) { return `${Number((length * FACTS.per_unit).toPrecision(3))} ${FACTS.unit}`; }

function label() {
    const box = get("distance");
    box.hidden = points.length !== 2;
    if (points.length === 2) {
        const middle = points[0].clone().add(points[1]).divideScalar(2).project(camera);
        box.style.left = `${(middle.x + 1) / 2 * innerWidth}px`;
        box.style.top = `${(1 - middle.y) / 2 * viewHeight()}px`;
        box.textContent = says(points[0].distanceTo(points[1]));
    }
    const most = 120 * pixel() * FACTS.per_unit, power = 10 ** Math.floor(Math.log10(most));
    const length = [5, 2, 1].map((digit) => digit * power).find((value) => value <= most);
    get("bar").firstElementChild.textContent = `${Number(length.toPrecision(1))} ${FACTS.unit}`;
    get("bar").lastElementChild.style.width = `${length / FACTS.per_unit / pixel()}px`;
}

start().catch((error) => {
    get("complaint").hidden = false;
    get("complaint").textContent = "This browser cannot draw the mesh: it needs WebGL and a version of 2023 or later.";
    console.error(error);
});
})();
