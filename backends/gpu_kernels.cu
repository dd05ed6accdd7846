// The loops of cpu_kernels.py for a GPU, with the same formulas in the same order. gpu_kernels.py compiles and starts
// these kernels, lists their names, and defines BETA, of the softplus.
//
// All values are float32. The rows of all matrices are `pitch` apart. In a block, blockIdx.x is the row and each thread
// has one column (EACH). `outputs` are a layer's, `inputs` the next layer's. Where the next one is the skip layer, it
// has more inputs than this one has outputs: [h, gamma(x)] / sqrt(2). In the backward pass the hits have rows of their
// own, before the points'. The hits are also the first points; `own` is the row of what the forward pass has kept.
typedef long long Int;
#define KERNEL extern "C" __global__ void
#define ROOT_HALF 0.70710678f
#define SCALE (inputs > outputs ? ROOT_HALF : 1.0f)
#define EACH(columns) \
    const Int row = blockIdx.x, column = blockIdx.y * (Int)blockDim.x + threadIdx.x, at = row * pitch + column; \
    if (column >= (columns)) return; \
    (void)at;

__device__ float frequency(Int column) { return column < 3 ? 0.0f : (float)(1 << (column - 3) / 6); }

// The column's value of gamma(x), of its coordinate x, and the derivative.
__device__ float encoding(float x, Int column, float *slope) {
    *slope = 1.0f;
    if (column < 3) return x;
    float sine, cosine;
    const bool is_sine = (column - 3) % 6 < 3;
    sincosf(frequency(column) * x, &sine, &cosine);
    *slope = frequency(column) * (is_sine ? cosine : -sine);
    return is_sine ? sine : cosine;
}

KERNEL encode(const float *x, float *encoded, float *derivative, Int columns, Int pitch) {
    EACH(columns)
    float slope;
    encoded[at] = encoding(x[3 * row + column % 3], column, &slope);
    if (derivative) derivative[at] = slope;
}

// A thread has four columns. With one, a block would have too little to do.
#define EACH_FOUR \
    const Int row = blockIdx.x, first = 4 * (blockIdx.y * (Int)blockDim.x + threadIdx.x), base = row * pitch; \
    if (first >= inputs) return; \
    for (Int column = first, at = base + first; column < min(first + 4, inputs); column++, at++)

KERNEL softplus(const float *z, const float *b, const float *encoded, float *h, float *slopes,
                Int outputs, Int inputs, Int pitch) {
    EACH_FOUR {
        if (column >= outputs) {
            h[at] = encoded[at - outputs] * ROOT_HALF;
            continue;
        }
        float v = (z[at] + b[column]) * BETA, e = expf(-fabsf(v));
        h[at] = (fmaxf(v, 0.0f) + log1pf(e)) * (1.0f / BETA) * SCALE;       // NaN stays NaN, in e
        if (slopes) slopes[at] = (v > 0.0f ? 1.0f : e) / (1.0f + e);
    }
}

// The sdf: a warp adds up each row of h * w.
KERNEL last_product(const float *h, const float *w, const float *b, float *sdf, Int rows, Int columns, Int pitch) {
    const Int row = (blockIdx.x * (Int)blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    float total = 0.0f;
    for (Int column = lane; column < columns; column += 32) total += h[row * pitch + column] * w[column * pitch];
    for (int other = 16; other; other /= 2) total += __shfl_xor_sync(0xffffffffu, total, other);
    if (lane == 0) sdf[row] = total + b[0];
}

KERNEL delta(const float *slopes, const float *back, Int row_step, Int column_step, float *deltas,
             Int outputs, Int inputs, Int pitch) {
    EACH(outputs)
    deltas[at] = slopes[at] * (back[row * row_step + column * column_step] * SCALE);
}

// d sdf / d gamma, from the first layer and from the skip layer if there is one, and d sdf / d x.
KERNEL find_normal(const float *back, const float *from_skip, const float *derivative, float *normal_encoded,
                   float *normals, Int columns, Int pitch) {
    EACH(3)
    float total = 0.0f;
    for (Int k = row * pitch + column; k < row * pitch + columns; k += 3) {
        normal_encoded[k] = back[k] + (from_skip ? from_skip[k] * ROOT_HALF : 0.0f);
        total += normal_encoded[k] * derivative[k];
    }
    normals[3 * row + column] = total;
}

// Write nnabla's arrays: sdf (rows,) and feature (rows, outputs - 1).
KERNEL hand_out(const float *z, const float *b, float *sdf, float *feature, Int outputs, Int pitch) {
    EACH(outputs)
    const float value = z[at] + b[column];
    if (column == 0) sdf[row] = value;
    else feature[row * (outputs - 1) + column - 1] = value;
}

// The rows of the backward pass: the gradients with respect to the hits, then to the points.
KERNEL take_in(const float *grad_sdf, const float *grad_normal, const float *grad_hit, const float *grad_hit_normal,
               const float *grad_hit_feature, const float *ray_directions, const float *derivative, float *tangents,
               float *grad_z, float *grad_hits, float *grad_hit_normals, float *directions, Int hits, Int columns,
               Int outputs, Int pitch) {
    EACH(max(outputs, columns))
    const bool of_hit = row < hits;
    const Int own = of_hit ? row : row - hits, c = 3 * own + column;
    if (column < columns)
        tangents[at] = derivative[own * pitch + column]
                       * (of_hit ? grad_hit_normal : grad_normal)[3 * own + column % 3];
    if (column < outputs) {
        float feature = of_hit && column ? grad_hit_feature[own * (outputs - 1) + column - 1] : 0.0f;
        grad_z[at] = of_hit || column ? feature : grad_sdf[own];
    }
    if (of_hit && column < 3)
        grad_hits[c] = grad_hit[c], grad_hit_normals[c] = grad_hit_normal[c], directions[c] = ray_directions[c];
}

KERNEL tangent(const float *tangent_z, const float *slopes, const float *deltas, const float *tangent_encoded,
               float *tangents, float *bends, Int hits, Int outputs, Int inputs, Int pitch) {
    EACH(inputs)
    if (column >= outputs) {
        tangents[at] = tangent_encoded[at - outputs] * ROOT_HALF;
        return;
    }
    const Int own = (row < hits ? row : row - hits) * pitch + column;
    float moved = slopes[own] * tangent_z[at];
    tangents[at] = moved * SCALE;
    bends[at] = (tangent_z[at] - moved) * deltas[own] * BETA;   // slope' = beta slope (1 - slope); delta has one slope
}

KERNEL add_back(const float *back, const float *slopes, float *grad_z, Int hits, Int outputs, Int inputs, Int pitch) {
    EACH(outputs)
    grad_z[at] += back[at] * SCALE * slopes[(row < hits ? row : row - hits) * pitch + column];
}

// The gradient with respect to each hit, and what its movement along the ray adds to that with respect to the sdf.
KERNEL move_hits(const float *back, const float *from_skip, const float *encoded, const float *derivative,
                 const float *normal_encoded, const float *normals, const float *grad_hit_normals,
                 const float *directions, float *grad_hits, float *shifts, float least_slope, Int columns,
                 Int pitch) {
    EACH(1)
    float along = 0.0f, slope = 0.0f;
    for (Int c = 3 * row; c < 3 * row + 3; c++) {
        float total = grad_hits[c];
        for (Int column = c - 3 * row; column < columns; column += 3) {     // gamma'' = -frequency^2 gamma
            Int k = at + column;
            float grad_encoded = back[k] + (from_skip ? from_skip[k] * ROOT_HALF : 0.0f), f = frequency(column);
            total += grad_encoded * derivative[k] - f * f * encoded[k] * normal_encoded[k] * grad_hit_normals[c];
        }
        grad_hits[c] = total;
        along += total * directions[c];
        slope += normals[c] * directions[c];
    }
    shifts[row] = -along * (slope / fmaxf(slope * slope, least_slope * least_slope));
}

// Add the hits' rows to their points'. The shift reaches every z through its delta.
KERNEL add_hits(const float *shifts, const float *deltas, float *tangents, float *grad_z, Int hits, Int inputs,
                Int outputs, Int pitch) {
    EACH(max(inputs, outputs))
    if (column < inputs) tangents[at + hits * pitch] += tangents[at];
    if (column < outputs) grad_z[at + hits * pitch] += grad_z[at] + shifts[row] * deltas[at];
}

KERNEL find_grad_points(const float *grad_z, const float *normals, const float *grad_hits, float *grad_points,
                        Int hits, Int pitch) {
    EACH(3)
    Int c = 3 * row + column;
    grad_points[c] = grad_z[(row + hits) * pitch] * normals[c] + (row < hits ? grad_hits[c] : 0.0f);
}

// --- the renderer

KERNEL copy_rows(const float *from, Int from_pitch, float *to, Int to_pitch, Int add, Int columns) {
    const Int pitch = from_pitch;
    EACH(columns)
    const Int k = row * to_pitch + column;
    to[k] = (add ? to[k] : 0.0f) + from[at];
}

KERNEL relu(const float *z, const float *b, float *h, Int columns, Int pitch) {
    EACH(columns)
    float v = z[at] + b[column];
    h[at] = v < 0.0f ? 0.0f : v;        // NaN stays NaN
}

KERNEL relu_backward(const float *back, const float *h, float *grad_z, Int columns, Int pitch) {
    EACH(columns)
    grad_z[at] = h[at] > 0.0f ? back[at] : 0.0f;
}

KERNEL find_rgb(const float *z, const float *b, float *rgb, Int columns, Int pitch) {
    EACH(columns)
    rgb[row * columns + column] = tanhf(z[at] + b[column]);
}

KERNEL rgb_backward(const float *rgb, const float *grad_rgb, float *grad_z, Int columns, Int pitch) {
    EACH(columns)
    const Int k = row * columns + column;
    grad_z[at] = grad_rgb[k] * (1.0f - rgb[k] * rgb[k]);
}

// --- a training step

// The renderer's inputs of the hits: point, encoded direction to the camera, normal and feature, in so many columns.
KERNEL join_inputs(const float *points, const float *directions, const float *normals, const float *z, const float *b,
                   Int view, Int normal, Int feature, float *h, Int columns, Int z_pitch, Int pitch) {
    EACH(columns)
    float slope;
    Int c = column - 3;
    if (c < 0) h[at] = points[3 * row + column];
    else if (c < view) h[at] = encoding(-directions[3 * row + c % 3], c, &slope);
    else if ((c -= view) < normal) h[at] = normals[3 * row + c];
    else c -= normal, h[at] = z[row * z_pitch + c + 1] + b[c + 1];
}

// Each point's sdf, its share of the losses, parts (N, 3), and their gradients; terms: the weights of the mask and the
// eikonal loss, alpha. The hits' colours lie 3 apart.
KERNEL find_losses(const float *terms, const float *points, const float *object_mask, const float *mask_weights,
                   const float *directions, const float *rgb_true, const float *color_weights, const float *normals,
                   const float *z, const float *b, const float *rgb, float *sdf, float *grad_sdf, float *grad_normals,
                   float *grad_rgb, float *parts, Int rays, Int hits, Int rows, Int pitch) {
    EACH(1)
    const float alpha = terms[2], per_point = 1.0f / rows, *n = normals + 3 * row, value = z[row * pitch] + b[0];
    const float length = sqrtf(n[0] * n[0] + n[1] * n[1] + n[2] * n[2] + 1e-12f);      // a root has no derivative at 0
    const float error = length - 1.0f;
    float color = 0.0f, mask = 0.0f;
    for (int c = 0; c < 3; c++)
        grad_normals[3 * row + c] = 2.0f * terms[1] * per_point * error / length * n[c];
    sdf[row] = value, grad_sdf[row] = 0.0f;
    if (row < rays) {
        const float weight = mask_weights[row] / rays, wanted = object_mask[row], v = -alpha * value;
        const float e = expf(-fabsf(v)), sigmoid = (v > 0.0f ? 1.0f : e) / (1.0f + e);
        mask = weight * ((v > 0.0f ? v : 0.0f) - v * wanted + log1pf(e)) / alpha;
        grad_sdf[row] = terms[0] * weight * (wanted - sigmoid);
    }
    for (int c = 0; row < hits && c < 3; c++) {
        const float weight = color_weights[row] / rays, off = rgb[3 * row + c] - rgb_true[3 * row + c];
        color += weight * fabsf(off);
        grad_rgb[3 * row + c] = weight * (off > 0.0f ? 1.0f : off < 0.0f ? -1.0f : off);    // NaN stays NaN
    }
    parts[3 * row] = color, parts[3 * row + 1] = mask, parts[3 * row + 2] = error * error * per_point;
}

// The gradients with respect to the hits, their normals and features, and the directions, from that of the inputs.
KERNEL split_inputs(const float *grad_h, const float *directions, Int view, Int normal, Int feature, float *grad_hits,
                    float *grad_hit_normals, float *grad_hit_features, float *grad_directions, Int features,
                    Int pitch) {
    EACH(max(features, 3LL))
    const float *own = grad_h + row * pitch;
    if (column < features)
        grad_hit_features[row * features + column] = feature ? own[3 + view + normal + column] : 0.0f;
    if (column >= 3) return;
    const Int c = 3 * row + column;
    grad_hits[c] = own[column], grad_hit_normals[c] = normal ? own[3 + view + column] : 0.0f;
    float total = 0.0f, slope;
    for (Int k = column; k < view; k += 3) {
        encoding(-directions[c], k, &slope);
        total -= own[3 + k] * slope;
    }
    grad_directions[c] = total;
}

// --- sums over rows: from here on a block has 32 x 32 threads, which share 32 columns and add up over their rows.
#define COLUMN const Int column = blockIdx.x * 32LL + threadIdx.x; const bool there = column < outputs;
#define EACH_ROW(rows) for (Int row = threadIdx.y; there && row < (rows); row += 32)

__device__ float over_rows(float part) {
    __shared__ float parts[32][32];
    parts[threadIdx.y][threadIdx.x] = part;
    __syncthreads();
    float total = 0.0f;
    for (int k = 0; k < 32; k++) total += parts[k][threadIdx.x];
    return total;
}

// The sums (3,) of the losses' shares (rows, 3), by the threads of one block, in an order that is always the same.
KERNEL sum_losses(const float *parts, double *sums, Int rows) {
    __shared__ double shared[THREADS][3];
    const Int thread = threadIdx.x;
    for (int k = 0; k < 3; k++) {
        double own = 0.0;
        for (Int row = thread; row < rows; row += THREADS) own += parts[3 * row + k];
        shared[thread][k] = own;
    }
    __syncthreads();
    for (int k = 0; thread == 0 && k < 3; k++) {
        sums[k] = 0.0;
        for (int other = 0; other < THREADS; other++) sums[k] += shared[other][k];
    }
}

// For all layers at once: outputs is the pitch.
KERNEL sum_rows(const float *grad_zs, float *grad_biases, Int rows, Int outputs, Int layer_step) {
    COLUMN
    float part = 0.0f;
    EACH_ROW(rows) part += grad_zs[blockIdx.y * layer_step + row * outputs + column];
    part = over_rows(part);
    if (there && threadIdx.y == 0) grad_biases[blockIdx.y * outputs + column] = part;
}

// The rest is for all layers at once: of_all_layers of gpu_kernels.py fills the table, one row of `width` per layer.
#define LAYER const Int *layer = table + blockIdx.y * width; const Int inputs = layer[0], outputs = layer[1];
#define ARRAY(k) ((float *)layer[(k) + 2])

KERNEL fold(const Int *table, Int width, Int pitch) {
    LAYER
    const float *v = ARRAY(0), *g = ARRAY(1), *b = ARRAY(2);
    float *w = ARRAY(3), *biases = ARRAY(4), *norms = ARRAY(5);
    COLUMN
    float part = 0.0f;
    EACH_ROW(inputs) part += v[row * outputs + column] * v[row * outputs + column];
    float norm = sqrtf(over_rows(part));
    EACH_ROW(inputs) w[row * pitch + column] = v[row * outputs + column] * (g[column] / norm);
    if (there && threadIdx.y == 0) norms[column] = norm, biases[column] = b[column];
}

// With `add` 0 it writes the gradients, else it adds to them.
KERNEL fold_backward(const Int *table, Int width, Int pitch) {
    LAYER
    const float *v = ARRAY(0), *g = ARRAY(1), *norms = ARRAY(2), *grad_w = ARRAY(3), *grad_biases = ARRAY(4);
    float *grad_v = ARRAY(5), *grad_g = ARRAY(6), *grad_b = ARRAY(7);
    const Int add = layer[10];
    COLUMN
    float part = 0.0f;
    EACH_ROW(inputs) part += grad_w[row * pitch + column] * v[row * outputs + column];
    part = over_rows(part);
    if (!there) return;
    float norm = norms[column], of_g = part / norm;
    EACH_ROW(inputs) {
        Int k = row * outputs + column;
        grad_v[k] = (add ? grad_v[k] : 0.0f)
                    + (grad_w[row * pitch + column] - v[k] * (of_g / norm)) * (g[column] / norm);
    }
    if (threadIdx.y == 0) {
        grad_g[column] = (add ? grad_g[column] : 0.0f) + of_g;
        grad_b[column] = (add ? grad_b[column] : 0.0f) + grad_biases[column];
    }
}
