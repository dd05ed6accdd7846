// The search of ray_tracer.hit_or_least_sdf with a grid, for a GPU: one thread for each ray, sample, point or gap.
// gpu_search.py compiles and starts these kernels and defines the constants. The names are those of ray_tracer.py and
// tracing/sdf_grid.py, where each function is explained.
//
// Rows of `rays`: origin, direction, near end and length of the chord, what is wanted. t, table, state (S, R): the
// samples' distances; their sdf, or a lower bound of it; and which of the two. They lie by samples, not by rays, as
// neighbouring threads then read neighbouring places. BETWEEN: the bound is a parabola's.
typedef long long Int;
#define KERNEL extern "C" __global__ void
#define INFINITE 3e38f
enum State : unsigned char { BOUNDED, BETWEEN, LISTED, EXACT };
enum Wanted { LEAST, HIT_OR_LEAST, HIT };

struct Ray { float origin[3], direction[3], near, length, wanted; };

template <typename T> struct Of {   // one ray's samples
    T *first;
    Int step;
    __device__ T &operator[](Int number) const { return first[number * step]; }
};

struct List {       // the points to evaluate next: how many, which sample or gap they are of, and where
    int *count, *places;
    float *points;
    Int room;
};

#define LIST int *count, int *places, float *points, Int room
#define THE_LIST const List list = {count, places, points, room};

struct Gap {
    float near, far, near_value, far_value;
    int ray, first, count;      // of its points in the list
    bool holds, walking, active;
};

__device__ void put(List list, int k, int place, const Ray &ray, float t) {
    list.places[k] = place;
    for (int c = 0; c < 3; c++) list.points[3 * k + c] = ray.origin[c] + ray.direction[c] * t;
}

#define EACH(count) \
    const Int i = blockIdx.x * (Int)blockDim.x + threadIdx.x; \
    if (i >= (count)) return;

// --- the grid

struct Grid {       // values (side, side, side), margins (2, NUM_MARGINS)
    const float *values, *margins;
    Int side;
};

#define GRID const float *grid_values, const float *margins, Int side
#define THE_GRID const Grid grid = {grid_values, margins, side};

struct Cell { Int below; float above; };    // the number of the grid's point below, and how many steps it is away

__device__ Cell cell(float x, Int side) {
    const float place = (x + 1.0f) * (0.5f * (side - 1));
    const Int below = min(max((Int)place, 0LL), side - 2);
    return {below, place - below};
}

// The value and weight of each of the 8 points of the grid around x, and where they are.
struct Corners {
    Int place[8];
    float weight[8], above[3];
    __device__ Corners(const float *x, Int side) {
        const Cell a = cell(x[0], side), b = cell(x[1], side), c = cell(x[2], side);
        above[0] = a.above, above[1] = b.above, above[2] = c.above;
        for (int k = 0; k < 8; k++) {
            const int i = k >> 2, j = k >> 1 & 1, l = k & 1;
            place[k] = ((a.below + i) * side + b.below + j) * side + c.below + l;
            weight[k] = (i ? a.above : 1.0f - a.above) * (j ? b.above : 1.0f - b.above)
                        * (l ? c.above : 1.0f - c.above);
        }
    }
    __device__ float value(const float *values) const {
        float sum = 0.0f;
        for (int k = 0; k < 8; k++) sum += weight[k] * values[place[k]];
        return sum;
    }
    __device__ float far(int k) const {     // how many steps of the grid from x
        const float a = above[0] - (k >> 2), b = above[1] - (k >> 1 & 1), c = above[2] - (k & 1);
        return sqrtf(a * a + b * b + c * c);
    }
};

__device__ float estimate_at(Grid grid, const Ray &ray, float t) {
    float x[3];
    for (int c = 0; c < 3; c++) x[c] = ray.origin[c] + ray.direction[c] * t;
    return Corners(x, grid.side).value(grid.values);
}

// Add to changes (side, side, side, 2) what values (N,) at points (N, 3) ask of the grid's points, and their weight.
// Bring those to where MAX_SLOPE allows them to be. If two threads do so at once, either one may prevail.
KERNEL learn(float *grid_values, const float *margins, Int side, const float *points, const float *values, Int count,
             float *changes) {
    EACH(count)
    if (!(fabsf(values[i]) < INFINITE)) return;
    const Corners corners(points + 3 * i, side);
    const float slope = 2.0f * MAX_SLOPE / (side - 1);
    float square = 0.0f, value = 0.0f;
    for (int k = 0; k < 8; k++) {
        const float most = slope * corners.far(k), before = grid_values[corners.place[k]];
        const float known = fminf(fmaxf(before, values[i] - most), values[i] + most);
        if (known != before) grid_values[corners.place[k]] = known;
        value += corners.weight[k] * known;
        square += corners.weight[k] * corners.weight[k];
    }
    const float step = (values[i] - value) / square;
    for (int k = 0; k < 8; k++) {
        atomicAdd(changes + 2 * corners.place[k], step * corners.weight[k] * corners.weight[k]);
        atomicAdd(changes + 2 * corners.place[k] + 1, corners.weight[k]);
    }
}

// Change the grid's values (count,) by what they have been asked for.
KERNEL change(float *values, float *changes, Int count) {
    EACH(count)
    if (changes[2 * i + 1] > 0.0f) values[i] += changes[2 * i] / changes[2 * i + 1];
    changes[2 * i] = changes[2 * i + 1] = 0.0f;
}

// --- a finer grid

#define EACH_POINT(side) \
    EACH((Int)(side) * (side) * (side)) \
    const Int index[] = {i / (side) / (side), i / (side) % (side), i % (side)};

__device__ Int add(LIST, Int place, const float *x) {
    const Int k = atomicAdd(count, 1);
    if (k >= room) return -1;
    places[k] = place;
    for (int c = 0; c < 3; c++) points[3 * k + c] = x[c];
    return k;
}

// Set fine (fine_side, fine_side, fine_side) to the grid's values. List the points where these are at most `band`.
KERNEL list_near(GRID, float band, float *fine, Int fine_side, LIST) {
    EACH_POINT(fine_side)
    float x[3];
    for (int c = 0; c < 3; c++) x[c] = -1.0f + 2.0f * index[c] / (fine_side - 1);
    fine[i] = Corners(x, side).value(grid_values);
    if (fabsf(fine[i]) <= band) add(count, places, points, room, i, x);
}

// List the middles of the grid's cells that the surface may cross, and write the grid's values there to `expected`.
KERNEL list_middles(GRID, float *expected, LIST) {
    const Int cells = side - 1;
    EACH_POINT(cells)
    const float step = 2.0f / cells;
    float x[3];
    for (int c = 0; c < 3; c++) x[c] = -1.0f + step * (index[c] + 0.5f);
    const float value = Corners(x, side).value(grid_values);
    if (!(fabsf(value) < step)) return;
    const Int k = add(count, places, points, room, i, x);
    if (k >= 0) expected[k] = value;
}

// Set out to the values (listed,) at the listed places, and empty the list.
KERNEL put_values(LIST, Int listed, const float *values, float *out) {
    EACH(listed)
    out[places[i]] = values[i];
    if (i == 0) *count = 0;
}

// --- samples

#define SAMPLES const Ray *all_rays, Int rays, Int samples, float *all_t, float *all_table, unsigned char *all_state, \
                float tolerance, LIST
#define EACH_RAY \
    EACH(rays) \
    THE_LIST \
    const Ray ray = all_rays[i]; \
    const Wanted wanted = (Wanted)(int)ray.wanted; \
    const Of<float> t = {all_t + i, rays}, table = {all_table + i, rays}; \
    const Of<unsigned char> state = {all_state + i, rays};

// What is known of the samples besides: the grid's values; in each round, the margin without which a sample would not
// be in doubt, negative if a parabola's (ROUNDS, S, R); where samples matter, and which one is the first that was moved,
// or -1 (R, 3).
#define DOUBTS float *all_estimate, float *all_needed, int *within
#define THE_DOUBTS \
    const Of<float> estimate = {all_estimate + i, rays}; \
    within += 3 * i;

// List a sample of a ray. i: the ray's number.
__device__ void list_sample(List list, Int i, Int number, const Ray &ray, Of<float> t, Of<unsigned char> state) {
    state[number] = LISTED;
    put(list, atomicAdd(list.count, 1), number * t.step + i, ray, t[number]);
}

// Move two samples to where the grid is `narrow` and -narrow, around its first change of sign, before sample `entry`.
__device__ void move_around_entry(Grid grid, const Ray &ray, Of<float> t, Of<float> estimate, Int entry, float narrow) {
    float near = t[entry - 1], far = t[entry], near_value = estimate[entry - 1], far_value = estimate[entry];
    const float slope = fmaxf((near_value - far_value) / (far - near), 0.1f);
    for (int step = 0; step < 3; step++) {
        const float zero = near + (far - near) * (near_value / (near_value - far_value));
        const float value = estimate_at(grid, ray, zero);
        if (value > 0.0f) near = zero, near_value = value;
        else far = zero, far_value = value;
    }
    const float zero = near + (far - near) * (near_value / (near_value - far_value));
    t[entry] = fmaxf(t[entry - 1], zero - narrow / slope), t[entry + 1] = fminf(t[entry + 1], zero + narrow / slope);
    for (Int number = entry; number <= entry + 1; number++) estimate[number] = estimate_at(grid, ray, t[number]);
}

// Set the samples' distances and the grid's values there. List those on either side of the first change of sign, else
// the one of least value; none where only a hit matters and no sample can be near the surface.
// narrow: where only a hit matters, two samples are moved to where the grid is so far from 0; 0 leaves them in place.
KERNEL list_first_guess(SAMPLES, GRID, DOUBTS, const float *fractions, float narrow) {
    EACH_RAY
    THE_GRID
    THE_DOUBTS
    float doubt = 0.0f, least = INFINITE;
    for (int k = 0; k < NUM_MARGINS; k++) doubt = fmaxf(doubt, 2.0f * margins[k]);      // of what the grid says
    for (Int number = 0; number < samples; number++) {
        const float here = ray.near + ray.length * fractions[number];
        t[number] = here, table[number] = INFINITE, state[number] = BOUNDED;
        for (int round = 0; round < ROUNDS; round++) all_needed[(round * samples + number) * rays + i] = 0.0f;
        if (number % READ_STRIDE == 0) least = fminf(least, estimate[number] = estimate_at(grid, ray, here));
    }
    const float spacing = ray.length * (fractions[samples - 1] - fractions[0]) / samples;
    const float slack = doubt + MAX_SLOPE * READ_STRIDE * spacing;
    Int first = samples, last = 0, entry = 0;
    within[0] = within[1] = 0, within[2] = -1;
    if (wanted == HIT && least > slack) return;
    for (Int number = 0; number < samples; number += READ_STRIDE)
        if (estimate[number] <= fmaxf(least, 0.0f) + slack) first = min(first, number), last = number;
    within[0] = first = max(first - READ_STRIDE, 0LL), within[1] = last = min(last + READ_STRIDE, samples);
    Int lowest = max(first, 1LL);
    for (Int number = first; number < last; number++) {
        if (number % READ_STRIDE) estimate[number] = estimate_at(grid, ray, t[number]);
        if (number > lowest && estimate[number] < estimate[lowest]) lowest = number;
        if (!entry && wanted != LEAST && number > first && estimate[number] <= 0.0f && estimate[number - 1] > 0.0f)
            entry = number;
    }
    if (entry && narrow > 0.0f && wanted == HIT && entry + 1 < last) {
        move_around_entry(grid, ray, t, estimate, entry, narrow);
        within[2] = entry++;
    }
    if (entry) list_sample(list, i, entry - 1, ray, t, state);
    list_sample(list, i, entry ? entry : lowest, ray, t, state);
}

// Which margin is that of a ray whose least sdf is `least`.
__device__ int level(float least) {
    const float levels[] = {LEVELS};
    int which = 1;
    for (int k = 0; k < NUM_MARGINS - 2; k++) which += levels[k] < least;
    return which;
}

// What is known of one ray's samples in a round: a lower bound of the sdf, what is expected, up to what margin.
struct Bounds { Of<float> low, expected, margin; };

// The value at x of the parabola through the samples a, b and c.
__device__ float parabola(Of<float> t, Of<float> values, Int a, Int b, Int c, float x) {
    const float slope = (values[b] - values[a]) / (t[b] - t[a]), next_slope = (values[c] - values[a]) / (t[c] - t[a]);
    return values[a] + (x - t[a]) * (slope + (x - t[b]) * (next_slope - slope) / (t[c] - t[b]));
}

// Bound one ray's sdf between close evaluated samples by a parabola, up to its error, where that is a higher bound.
__device__ void bound_between(Of<float> t, Of<float> table, Of<unsigned char> state, Int first, Int end,
                              float wide_error, Bounds bounds) {
    Int before = -1, start = -1;
    for (Int stop = first; stop < end; stop++) {
        if (state[stop] != EXACT) continue;
        if (start >= 0 && stop - start > 1 && stop - start <= MAX_STRIDE) {
            const float error = wide_error * ((t[stop] - t[start]) / WIDE);
            Int after = stop + 1;
            while (after < end && state[after] != EXACT) after++;
            for (Int number = start + 1; number < stop; number++) {
                const bool nearer = before >= 0 && (after == end || number - before < after - number);
                const Int third = nearer ? before : after;
                if (third == end || max(third - number, number - third) > 2 * MAX_STRIDE) continue;
                const float value = parabola(t, table, start, stop, third, t[number]);
                if (!(value - error > bounds.low[number])) continue;
                bounds.low[number] = value - error, bounds.expected[number] = value, bounds.margin[number] = error;
                state[number] = BETWEEN;
            }
        }
        before = start, start = stop;
    }
}

// Bound one ray's sdf from `first` to `*end`, which becomes that of the samples up to the entry if it is known. Returns
// the least sdf found, and the error of a parabola through samples WIDE apart.
__device__ float bound(Of<float> t, Of<float> table, Of<unsigned char> state, Of<float> estimate, Int first, Int *end,
                       bool want_hit, const float *margins, float tolerance, Bounds bounds, float *wide_error) {
    float least = INFINITE;
    bool outside = first > 0;
    for (Int number = first; number < *end; number++) {
        if (state[number] != EXACT) continue;
        if (number > 0) least = fminf(least, table[number]);
        if (want_hit && outside && table[number] <= tolerance) {
            *end = number + 1;
            break;
        }
        outside |= table[number] > tolerance;
    }
    const int which = want_hit && least <= tolerance && outside ? 0 : level(least);
    for (int backwards = 0; backwards < 2; backwards++) {
        bool known = false;
        float known_t, known_value, known_estimate;
        for (Int step = 0; step < *end - first; step++) {
            const Int number = backwards ? *end - 1 - step : first + step;
            const float here = t[number], guess = estimate[number];
            if (state[number] == EXACT) {
                known = true, known_t = here, known_value = table[number], known_estimate = guess;
                bounds.low[number] = bounds.expected[number] = known_value, bounds.margin[number] = 0.0f;
                continue;
            }
            if (!backwards) {
                bounds.low[number] = bounds.expected[number] = -INFINITE, bounds.margin[number] = INFINITE;
                state[number] = BOUNDED;
            }
            if (!known) continue;
            const float far = fabsf(here - known_t), error = fminf(margins[which], ERROR_SLOPE * far);
            const float value = guess + known_value - known_estimate;
            const float low = fmaxf(value - error, known_value - MAX_SLOPE * far);
            if (low > bounds.low[number])
                bounds.low[number] = low, bounds.expected[number] = value, bounds.margin[number] = error;
        }
    }
    *wide_error = margins[NUM_MARGINS + which];
    if (least > SMOOTH) bound_between(t, table, state, first, *end, *wide_error, bounds);
    return least;
}

// Copy from `all` (S, R) what is of one ray's samples, several at a time, as each waits long for its value.
template <typename T> __device__ void copy_samples(const T *all, Int first, Int end, Int rays, Int i, Of<T> to) {
    for (Int number = first; number < end; number += 8) {
        T some[8];
        for (int k = 0; k < 8; k++) some[k] = all[min(number + k, end - 1) * rays + i];
        for (int k = 0; k < 8; k++) to[min(number + k, end - 1)] = some[k];
    }
}

// List the samples in doubt; in round 0, of those that may be the least, only some. What is read more than once is
// copied to memory that the threads of a block share, which is near.
KERNEL list_doubtful(SAMPLES, GRID, DOUBTS, Int round) {
    extern __shared__ float shared[];
    EACH(rays)
    THE_LIST
    const Int first = within[3 * i], threads = blockDim.x, columns = samples * threads;
    Int end = within[3 * i + 1];
    if (first == end) return;
    const Ray ray = all_rays[i];
    float *own = shared + threadIdx.x;
    const Of<float> t = {own, threads}, table = {own + columns, threads}, estimate = {own + 2 * columns, threads};
    const Bounds bounds = {{own + 3 * columns, threads}, {own + 4 * columns, threads}, {own + 5 * columns, threads}};
    const Of<unsigned char> state = {(unsigned char *)(shared + 6 * columns) + threadIdx.x, threads};
    copy_samples(all_t, first, end, rays, i, t);
    copy_samples(all_table, first, end, rays, i, table);
    copy_samples(all_estimate, first, end, rays, i, estimate);
    copy_samples(all_state, first, end, rays, i, state);
    const Of<float> low = bounds.low, mark = bounds.margin;
    const bool want_hit = ray.wanted != LEAST;
    float wide_error;
    const float least = bound(t, table, state, estimate, first, &end, want_hit, margins, tolerance, bounds,
                              &wide_error);
    auto need = [&](Int number, float margin) {
        float &needed = all_needed[(round * samples + number) * rays + i];
        needed = state[number] == BETWEEN ? -margin * (wide_error / bounds.margin[number]) : margin;
    };
    int found = 0;
    auto mark_listed = [&](Int number) {
        if (state[number] < LISTED) state[number] = LISTED, found++;
    };
    bool outside = first > 0, sure = ray.wanted == HIT;
    // A sample may be the entry, or the surface may hide in the gap before it, where both ends are listed.
    for (Int number = first; want_hit && number < end; number++) {
        const Int last = max(number - 1, first);
        const bool hides = ray.wanted != HIT && outside && low[number] > tolerance
                           && low[number] + low[last] < t[number] - t[last];
        if (low[number] <= tolerance || hides) {
            const float margin = bounds.expected[number] - tolerance;
            if (state[number] != EXACT && margin > 0.0f) need(number, margin);
            mark_listed(last);
            mark_listed(number);
        }
        if (outside && bounds.expected[number] + bounds.margin[number] <= tolerance) {
            sure = true;
            break;
        }
        outside |= low[number] > tolerance;
    }
    // Mark those of the others that may be the least. Margins are not read again.
    Int doubtful = 0;
    for (Int number = first; !sure && number < end; number++) {
        const bool open = number > 0 && state[number] < LISTED;
        const float margin = bounds.expected[number] - least;
        if (open && margin > 0.0f) need(number, margin);
        mark[number] = open && low[number] <= least;
        doubtful += mark[number] > 0.0f;
    }
    const bool smooth = least > SMOOTH;
    const Int stride = smooth && round == 0 ? min(doubtful / FEW, (Int)MAX_STRIDE) : 1;
    for (Int number = first; doubtful && number < end; number++) {
        if (mark[number] == 0.0f) continue;
        if (stride > 1) {
            mark_listed(max(number / stride * stride, first));
            mark_listed(min((number + stride - 1) / stride * stride, end - 1));
        } else if (smooth || round > 0 || number % 2 == 0) mark_listed(number);
    }
    int next = found ? atomicAdd(list.count, found) : 0;
    for (Int number = first; number < end; number++) {
        all_table[number * rays + i] = low[number], all_state[number * rays + i] = state[number];
        if (state[number] == LISTED) put(list, next++, number * rays + i, ray, t[number]);
    }
    if (!found && (sure || round > 0)) within[3 * i] = within[3 * i + 1] = 0;
}

// Take in the sdf at the listed samples.
KERNEL take(LIST, Int listed, const float *values, float *table, unsigned char *state) {
    EACH(listed)
    table[places[i]] = values[i], state[places[i]] = EXACT;
    if (i == 0) *count = 0;
}

// Note what each ray's answer has needed: the most of each kind and level, `most` (2, NUM_MARGINS), and of how many
// rays.
KERNEL note_needs(SAMPLES, DOUBTS, float *most, int *how_many) {
    EACH_RAY
    THE_DOUBTS
    bool outside = false, enters = false;
    Int answer = 1;
    for (Int number = 0; number < samples && !enters; number++) {
        if (state[number] == EXACT) {
            enters = wanted != LEAST && outside && table[number] <= tolerance;
            if (enters || number > 0 && (table[number] < table[answer] || state[answer] != EXACT)) answer = number;
        }
        outside |= table[number] > tolerance;
    }
    const int which = enters ? 0 : level(table[answer]);
    for (int round = 0; round < ROUNDS; round++) {
        const float need = all_needed[(round * samples + answer) * rays + i];
        float *kind = most + (need < 0.0f ? NUM_MARGINS : 0);
        atomicMax((int *)kind + which, __float_as_int(fabsf(need)));    // numbers above 0 are in the same order
    }
    atomicAdd(how_many + which, 1);
}

// Adapt the margins to what has been noted, and forget that.
KERNEL widen(float *margins, float *most, int *how_many) {
    EACH(NUM_MARGINS)
    const float least[] = {LEAST_MARGINS}, spares[] = {SPARES};
    for (int kind = 0; kind < 2; kind++) {
        const Int k = kind * NUM_MARGINS + i;
        margins[k] = fmaxf(fmaxf(margins[k] * powf(1.0f - FORGET, how_many[i]), spares[i] * most[k]), least[kind]);
        most[k] = 0.0f;
    }
    how_many[i] = 0;
}

// Move one of a ray's samples to the distance `here`, if that is between its neighbours, and list it.
__device__ void move_sample(List list, Int i, Int number, float here, const Ray &ray, Of<float> t,
                            Of<unsigned char> state) {
    if (!(t[number - 1] < here && here < t[number + 1])) return;
    t[number] = here;
    list_sample(list, i, number, ray, t, state);
}

// Of an sdf that stays as it is: where the grid is least along a ray before its entry, and the sdf may be as low as
// spread * t, move three samples to there and to either side, and list them. Set passes (R,) to false.
KERNEL list_closest(SAMPLES, GRID, const int *within, float spread, unsigned char *passes) {
    EACH_RAY
    THE_GRID
    passes[i] = 0;
    float start = t[0], end = t[1], last = INFINITE, last_t = 0.0f;     // the grid at the place before, less spread * t
    Int falling = 0;    // the sample behind that place, if the grid has fallen to there
    const Int moved = within[3 * i + 2];
    for (Int number = 1; number < samples; number++) {
        if (table[number - 1] > tolerance && table[number] <= tolerance) return;
        const float next = t[min(number + 1, samples - 1)], width = end - start, step = width / CLOSER;
        const bool open = number != moved      // else the grid falls to the entry
                          && 0.5f * (table[number - 1] + table[number] - width) <= spread * end;
        for (int k = 0; k <= CLOSER && (open || falling); k++) {
            const float here = start + step * k;
            const float value = open ? estimate_at(grid, ray, here) - spread * here : INFINITE;
            if (falling && value > last) {
                const bool close = number != moved && last <= margins[0] + 0.5f * step;
                for (Int own = max(falling - 1, 1LL); close && own <= min(falling + 1, samples - 2); own++)
                    if (own != moved) move_sample(list, i, own, last_t + (own - falling) * BESIDE * width, ray, t, state);
                falling = 0;
            } else if (value < last) falling = number;
            last = value, last_t = here;
        }
        if (!open) last = INFINITE;
        start = end, end = next;
    }
}

// Take in the sdf at the listed samples, and set passes where a ray is there within the radius spread * t of the surface,
// or nearly: `slack` more.
KERNEL take_closest(SAMPLES, Int listed, const float *values, float spread, float slack, unsigned char *passes) {
    EACH(listed)
    const int place = places[i];
    all_table[place] = values[i], all_state[place] = EXACT;
    if (values[i] <= spread * all_t[place] + slack) passes[place % rays] = 1;
    if (i == 0) *count = 0;
}

// --- gaps

// Set found (R, 2) to the distance of each ray's sample of least sdf, and 0; list its gaps, which are consecutive.
// slack: where only hits matter, list_closest has looked into the gaps, and one with higher ends hides nothing.
KERNEL list_gaps(SAMPLES, float slack, float *found, Gap *gaps, int *num_gaps, int *ray_gaps) {
    EACH_RAY
    Int least = 1;
    for (Int number = 2; number < samples; number++)
        if (table[number] < table[least]) least = number;
    found[2 * i] = t[least], found[2 * i + 1] = 0.0f;
    int own = 0, first = 0;
    for (int writing = 0; wanted != LEAST && writing < 2; writing++) {
        if (writing) first = atomicAdd(num_gaps, own), own = 0;
        for (Int end = 0; end < samples; end++) {
            Int start = max(end - 1, 0LL);
            float before = table[start], value = table[end];
            const bool open = state[end] != EXACT && value <= tolerance;      // the rounds were too few
            bool entry = !open && (end == 0 ? fabsf(value) <= tolerance : before > tolerance && value <= tolerance);
            bool may_hide = end > 0 && before > tolerance && value > tolerance && before + value < t[end] - t[start]
                            && (wanted != HIT || state[end] == EXACT && fminf(before, value) <= slack);
            if (!entry && !may_hide && !open) continue;
            while (start > 0 && state[start] != EXACT) start--;
            if (open) {
                while (end < samples - 1 && state[end] != EXACT) end++;
                if (state[end] != EXACT || state[start] != EXACT || table[start] <= tolerance) continue;
                value = table[end], entry = value <= tolerance;
            }
            if (writing)
                gaps[first + own] = {t[start], t[end], table[start], value, (int)i, 0, 0, value <= tolerance,
                                     value >= -tolerance, true};
            own++;
            if (entry) break;
        }
    }
    ray_gaps[2 * i] = first, ray_gaps[2 * i + 1] = own;
}

__device__ float power(int base, Int exponent) {
    float product = 1.0f;
    for (Int k = 0; k < exponent; k++) product *= base;
    return product;
}

// Set points to the next ones of a bracket, and return their number.
__device__ int narrowing(const Gap &gap, bool secant, Int steps_left, float tolerance, float *points) {
    const float width = gap.far - gap.near;
    if (!secant) {
        points[0] = gap.near + 0.5f * width;
        return 1;
    }
    const float zero = fminf(gap.near + width * (gap.near_value / (gap.near_value - gap.far_value)), gap.far);
    int parts = steps_left ? 2 : 1, count = 0;
    while (steps_left && parts < MAX_COVER && 2.0f * tolerance * power(parts, steps_left) < width) parts++;
    for (int k = 1; k <= parts; k++) {
        float cut = gap.near + width * ((float)k / parts);
        if (count < k && (k == parts || zero <= cut)) points[count++] = zero;
        if (k < parts) points[count++] = cut;
    }
    return count;
}

// Set points to those that cover a gap if its sdf is linear, and return their number.
__device__ int cover(const Gap &gap, float *points) {
    float fall = fmaxf((gap.near_value - gap.far_value) / (gap.far - gap.near), 0.0f);
    float point = gap.near, value = gap.near_value;
    for (int k = 0; k < MAX_COVER; k++) {
        const float free = point + value;
        point += 0.9f * 2.0f * value / (1.0f + fall);
        value = fmaxf(gap.near_value - fall * (point - gap.near), gap.far_value);
        points[k] = point;
        if (point + value + gap.far_value < gap.far) continue;
        points[k] = 0.5f * (free + gap.far - gap.far_value);
        return k + 1;
    }
    return MAX_COVER;
}

// Evenly spaced points in the part of a gap that its ends leave open.
struct Spread {
    float start, left;
    int count;
    __device__ Spread(const Gap &gap, Int least, Int most, float tolerance) {
        start = gap.near + gap.near_value, left = gap.far - gap.near - gap.near_value - fmaxf(gap.far_value, 0.0f);
        const float low = fmaxf(fminf(gap.near_value, gap.far_value), tolerance);
        count = (int)fminf(fmaxf(ceilf(left / (2.0f * STEADY * low)), (float)least), (float)most);
    }
    __device__ float operator[](int k) const { return start + left * ((k + 0.5f) / count); }
};

// List the next points of the active gaps, and write their distances to ahead. A gap without room waits.
KERNEL look_ahead(const Ray *rays, Gap *gaps, Int num_gaps, float *ahead, LIST, Int secant, Int num_ahead,
                  Int steps_left, float tolerance) {
    EACH(num_gaps)
    THE_LIST
    Gap gap = gaps[i];
    gap.count = 0;
    if (gap.active && gap.walking) gap.active = gap.near_value + gap.far_value < gap.far - gap.near;
    if (gap.active) {
        float points[MAX_COVER];
        const bool even = gap.walking && num_ahead > 1;
        const Int least = steps_left == 1 ? num_ahead : max((Int)(num_ahead * AHEAD_LEAST), 1LL);
        const Spread spread(gap, least, num_ahead, tolerance);
        const int wanted = even ? spread.count : gap.walking ? cover(gap, points)
                                                             : narrowing(gap, secant, steps_left, tolerance, points);
        gap.first = atomicAdd(list.count, wanted);
        gap.count = gap.first + wanted <= room ? wanted : 0;
        for (int k = 0; k < gap.count; k++) {
            const float t = even ? spread[k] : points[k];
            ahead[gap.first + k] = t;
            put(list, gap.first + k, i, rays[gap.ray], t);
        }
    }
    gaps[i] = gap;
}

// Narrow the gaps by `values`, the sdf at the points that look_ahead has listed.
KERNEL take_in(Gap *gaps, Int num_gaps, const float *ahead, const float *values, int *count,
               float tolerance) {
    EACH(num_gaps)
    if (i == 0) *count = 0;
    Gap gap = gaps[i];
    if (!gap.count) return;
    const int start = gap.first, end = start + gap.count;
    int stop = start, last = start - 1;
    while (stop < end && !(values[stop] <= tolerance)) stop++;
    float t = gap.near, value = gap.near_value;
    while (last + 1 < end && (!gap.walking || values[last + 1] < -tolerance
                              || value + fmaxf(values[last + 1], 2.0f * tolerance) >= ahead[last + 1] - t)) {
        last++;
        t = ahead[last], value = values[last];
    }
    const bool arrives = stop <= last;
    last = min(stop - 1, last);
    if (stop == end && gap.far_value > tolerance) {
        while (stop - 1 > last && values[stop - 1] + gap.far_value >= gap.far - ahead[stop - 1]) {
            stop--;
            gap.far = ahead[stop], gap.far_value = values[stop];
        }
    } else if (stop < end) {
        gap.far = ahead[stop], gap.far_value = values[stop];
        gap.holds = true;
        if (arrives) gap.walking = false, gap.active = fabsf(values[stop]) > tolerance;
    }
    if (start <= last) gap.near = ahead[last], gap.near_value = values[last];
    gaps[i] = gap;
}

// Set found (R, 2) to the distance of each ray's first entry and 1, where one of its gaps holds one.
KERNEL find_hits(const Gap *gaps, const int *ray_gaps, Int rays, float *found) {
    EACH(rays)
    for (int k = ray_gaps[2 * i]; k < ray_gaps[2 * i] + ray_gaps[2 * i + 1]; k++)
        if (gaps[k].holds) {
            bool near_is_best = fabsf(gaps[k].near_value) <= fabsf(gaps[k].far_value);
            found[2 * i] = near_is_best ? gaps[k].near : gaps[k].far, found[2 * i + 1] = 1.0f;
            return;
        }
}
