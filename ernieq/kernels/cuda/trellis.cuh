// From the ring of a tile to codebook values, for the eight weights that a lane owns in the tile.
//
// Constants: PAIR_BITS bits of a pair of weights, the second of which has the odd one, and L state bits.
//
// A ring is 4 PAIR_BITS words of 32 bits, first bit highest. Lane l owns bits 4 PAIR_BITS l to 4 PAIR_BITS (l + 1),
// and its states reach back before them.
constexpr int kTileWords = 4 * PAIR_BITS;
constexpr int kOddBits = (PAIR_BITS + 1) / 2;                  // of the second weight of a pair
constexpr int kWindowBits = 3 * PAIR_BITS + kOddBits + L;      // from the first bit of a lane's first state to its end
constexpr int kEndStep = PAIR_BITS % 8 == 0 ? 32 : 4 * (PAIR_BITS & -PAIR_BITS);  // ends are multiples of it, in bits
constexpr int kWindowWords = (kWindowBits + 32 - kEndStep + 31) / 32;

struct Window {
    u32 word[kWindowWords];  // last word first
};

// Where a lane reads its words, a pointer for each; moves on from tile to tile.
struct WindowReader {
    const u32* word[kWindowWords];
    __device__ __forceinline__ WindowReader(const u32* tile, int lane) {
        const int last = (4 * PAIR_BITS * (lane + 1) - 1) >> 5;
#pragma unroll
        for (int back = 0; back < kWindowWords; ++back)
            word[back] = tile + (last - back < 0 ? last - back + kTileWords : last - back);
    }
    __device__ __forceinline__ Window load(int tile) const {
        Window window;
#pragma unroll
        for (int back = 0; back < kWindowWords; ++back) window.word[back] = word[back][tile * kTileWords];
        return window;
    }
    __device__ __forceinline__ void advance(int tiles) {
#pragma unroll
        for (int back = 0; back < kWindowWords; ++back) word[back] += tiles * kTileWords;
    }
};

// The bits of a window from `right` bits before its end on, upwards; words: its last 32 bits, and those before.
__device__ __forceinline__ u32 bits_at(const u32 (&words)[3], int right) {
    if (right < 32) return __funnelshift_r(words[0], words[1], right);
    return kWindowBits > 64 ? __funnelshift_r(words[1], words[2], right & 31) : words[1] >> (right & 31);
}

// The L bits that end `right` bits before the end of a window.
__device__ __forceinline__ u32 state_at(const u32 (&words)[3], int right) {
    if (L != 16) return bits_at(words, right) & ((1 << L) - 1);
    // Two bytes of a word that several states share: one shift serves them all, and one permutation each.
    return __byte_perm(bits_at(words, right / 16 * 16 + right % 8), 0, right % 16 < 8 ? 0x4410 : 0x4421);
}

// Codebook values of a lane's weights as float16 pairs (exact): the A operand of mma.m16n8k16.
__device__ __forceinline__ void decode_window(const Window& window, int lane, half2_bits (&values)[4]) {
    const int shift = -4 * PAIR_BITS * (lane + 1) & 31;
    const u32 last = window.word[kWindowWords - 1];
    const u32 words[3] = {__funnelshift_r(window.word[0], window.word[1], shift),
                          kWindowWords == 3 ? __funnelshift_r(window.word[1], last, shift) : last >> shift,
                          last >> shift};
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        u32 bits[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            // 0x6400 + n is the float16 number 1024 + n, and the sum of four bytes is below 1024.
            bits[i] = __dp4a(0x83DCD12Du * state_at(words, (3 - pair) * PAIR_BITS + (i ? 0 : kOddBits)), 0x01010101u, 0x6400u);
        }
        values[pair] = sub2(__byte_perm(bits[0], bits[1], 0x5410), 0x65fe65feu);  // 1534 = 1024 + 510
    }
}

// sum += values (16 x 16) times eight tokens: mma.m16n8k16.
__device__ __forceinline__ void multiply_tile(float (&sum)[4], const half2_bits (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// What the values of a row are multiplied by.
__device__ __forceinline__ float row_factor(const u16* __restrict__ scale, size_t row) {
    return low_float(scale[row]) * 0.0078125f;  // / 128, exact
}
