// The search of ray_tracer.hit_or_least_sdf for a GPU: one thread for each ray, sample or gap. gpu_search.py compiles
// and starts these kernels and defines MAX_SLOPE, the assumed bound on the sdf's slope, and MAX_COVER. The names are
// those of ray_tracer.py, where each function is explained.
//
// Rows of `rays`: origin, direction, near end and length of the chord, what is wanted. t, table, state (R, S): the
// samples' distances; their sdf, or a lower bound of it; and what is known there. A value in half precision may be off
// by `error`; the table holds it minus that.
typedef long long Int;
#define KERNEL extern "C" __global__ void
enum State : unsigned char { BOUNDED, ROUGH, EXACT };
enum Wanted { LEAST, HIT_OR_LEAST, HIT };

struct Ray { float origin[3], direction[3], near, length, wanted; };

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

__device__ void add(List list, Int place, const Ray &ray, float t) {
    put(list, atomicAdd(list.count, 1), place, ray, t);
}

#define EACH(count) \
    const Int i = blockIdx.x * (Int)blockDim.x + threadIdx.x; \
    if (i >= (count)) return;

// --- samples

#define SAMPLES const Ray *all_rays, Int rays, Int samples, float *t, float *table, unsigned char *state, \
                float tolerance, float error, LIST
#define EACH_RAY \
    EACH(rays) \
    THE_LIST \
    const Ray ray = all_rays[i]; \
    const Wanted wanted = (Wanted)(int)ray.wanted; \
    t += i * samples, table += i * samples, state += i * samples;

// Set the samples' distances, and list every stride-th.
KERNEL list_every(SAMPLES, const float *fractions, Int stride) {
    EACH_RAY
    for (Int number = 0; number < samples; number++) {
        t[number] = ray.near + ray.length * fractions[number];
        state[number] = BOUNDED;
        if (number % stride == 0) add(list, i * samples + number, ray, t[number]);
    }
}

// What the known samples show, every step-th: the number of the entry, or `samples`; and the least sdf; both surely.
__device__ Int find_entry(const float *table, const unsigned char *state, Wanted wanted, Int samples, Int step,
                          float tolerance, float error, float *least) {
    bool outside = false;
    *least = wanted == HIT ? -3e38f : 3e38f;
    for (Int number = 0; number < samples; number += step) {
        if (state[number] == BOUNDED) continue;
        float most = table[number] + (state[number] == ROUGH ? 2.0f * error : 0.0f);
        if (number > 0) *least = fminf(*least, most);
        if (table[number] > tolerance) outside = true;
        else if (outside && wanted != LEAST && most <= tolerance) return number;
    }
    return samples;
}

__device__ bool matters(const float *t, float bound, Wanted wanted, Int number, Int samples, Int entry, float least,
                        float tolerance) {
    float width = t[number] - t[max(number - 1, 0LL)];
    if (number + 1 < samples) width = fmaxf(width, t[number + 1] - t[number]);
    return wanted != LEAST && number <= entry && bound <= MAX_SLOPE * width + tolerance
           || entry == samples && number > 0 && bound <= least;
}

// Of every fine-th sample between the coarse-th ones, list those that matter, and bound the sdf at the others.
KERNEL list_between(SAMPLES, Int coarse, Int fine) {
    EACH_RAY
    float least;
    const Int entry = find_entry(table, state, wanted, samples, coarse, tolerance, error, &least);
    for (Int number = fine; number < samples; number += fine) {
        Int before = number / coarse * coarse, after = before + coarse;
        if (number == before) continue;
        float bound = table[before] - MAX_SLOPE * (t[number] - t[before]);
        if (after < samples) bound = fmaxf(bound, table[after] - MAX_SLOPE * (t[after] - t[number]));
        table[number] = bound;
        if (matters(t, bound, wanted, number, samples, entry, least, tolerance))
            add(list, i * samples + number, ray, t[number]);
    }
}

// List the samples that matter and are not exact yet.
KERNEL list_rough(SAMPLES) {
    EACH_RAY
    float least;
    const Int entry = find_entry(table, state, wanted, samples, 1, tolerance, error, &least);
    for (Int number = 0; number < samples; number++)
        if (state[number] != EXACT && matters(t, table[number], wanted, number, samples, entry, least, tolerance))
            add(list, i * samples + number, ray, t[number]);
}

// Take in the sdf at the listed samples, exact or in half precision. worst (in units of 2^-24) becomes the largest
// difference of the two.
KERNEL take(LIST, Int listed, const float *values, float *table, unsigned char *state, Int exact, float error,
            int *worst) {
    EACH(listed)
    const int place = places[i];
    if (exact && state[place] == ROUGH) {
        float off = fabsf(values[i] - (table[place] + error));
        if (off < 1.0f) atomicMax(worst, (int)(off * 16777216.0f));
    }
    table[place] = exact ? values[i] : values[i] - error;
    state[place] = exact ? EXACT : ROUGH;
    if (i == 0) *count = 0;
}

// Set passes (R,) to whether a ray may pass the surface within the radius spread * t, before it enters the object: where
// a sample is lower than its neighbours, the sdf falls by no more than half of what its slope allows between them.
KERNEL find_passes(SAMPLES, float spread, unsigned char *passes) {
    EACH_RAY
    passes[i] = 0;
    for (Int number = 1; number < samples; number++) {
        float before = table[number - 1], value = table[number], width = t[number] - t[number - 1], after = value;
        if (before > tolerance && value <= tolerance) return;
        if (number + 1 < samples) after = table[number + 1], width = fmaxf(width, t[number + 1] - t[number]);
        if (value <= before && value <= after && 0.5f * (value + fminf(before, after) - width) <= spread * t[number])
            passes[i] = 1;
    }
}

// --- gaps

// Set found (R, 2) to the distance of each ray's sample of least sdf, and 0; list its gaps, which are consecutive.
KERNEL list_gaps(SAMPLES, float *found, Gap *gaps, int *num_gaps, int *ray_gaps) {
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
            bool entry = end == 0 ? fabsf(value) <= tolerance : before > tolerance && value <= tolerance;
            bool may_hide = end > 0 && before > tolerance && value > tolerance && before + value < t[end] - t[start];
            if (entry || may_hide) {
                while (start > 0 && state[start] == BOUNDED) start--;
                if (writing)
                    gaps[first + own] = {t[start], t[end], table[start], value, (int)i, 0, 0, value <= tolerance,
                                         value >= -tolerance, true};
                own++;
            }
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
    float point = fminf(gap.near + gap.near_value, gap.far);
    for (int k = 0; k < MAX_COVER; k++) {
        points[k] = point;
        float value = fmaxf(gap.near_value - fall * (point - gap.near), gap.far_value);
        if (point + value + gap.far_value >= gap.far) return k + 1;
        point += 0.9f * 2.0f * value / (1.0f + fall);
    }
    return MAX_COVER;
}

// List the next points of the active gaps, and write their distances to ahead. A gap without room waits.
KERNEL look_ahead(const Ray *rays, Gap *gaps, Int num_gaps, float *ahead, LIST, Int secant, Int num_ahead,
                  Int steps_left, float tolerance) {
    EACH(num_gaps)
    THE_LIST
    Gap gap = gaps[i];
    gap.count = 0;
    if (gap.active && gap.walking) gap.active = gap.near_value + gap.far_value < gap.far - gap.near;
    if (gap.active) {
        float points[MAX_COVER], reached = fminf(gap.near + gap.near_value, gap.far);
        const bool even = gap.walking && num_ahead > 1;
        const int wanted = even ? (int)num_ahead : gap.walking ? cover(gap, points)
                                                               : narrowing(gap, secant, steps_left, tolerance, points);
        gap.first = atomicAdd(list.count, wanted);
        gap.count = gap.first + wanted <= room ? wanted : 0;
        for (int k = 0; k < gap.count; k++) {
            float t = even ? reached + (gap.far - reached) * ((float)k / num_ahead) : points[k];
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
    int stop = start, last = start;
    while (stop < end && !(values[stop] <= tolerance)) stop++;
    while (last + 1 < end && (!gap.walking || values[last + 1] < -tolerance || values[last] + fmaxf(
               values[last + 1], 2.0f * tolerance) >= ahead[last + 1] - ahead[last])) last++;
    const bool arrives = stop <= last;
    last = min(stop - 1, last);
    if (start <= last) gap.near = ahead[last], gap.near_value = values[last];
    if (stop < end) gap.far = ahead[stop], gap.far_value = values[stop];
    if (stop < end) {
        gap.holds = true;
        if (arrives) gap.walking = false, gap.active = fabsf(values[stop]) > tolerance;
    }
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
