// Eight floats in a register: AVX2, FMA and F16C. Included inside the namespace and target of one translation unit.
struct Vec {
    using Floats = __m256;
    static constexpr int lanes = 8;

    static Floats zero() { return _mm256_setzero_ps(); }
    static Floats broadcast(float x) { return _mm256_set1_ps(x); }
    static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
    static Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
    static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
    static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    // The second operand where either is NaN.
    static Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
    static Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
    static Floats round(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

    static Floats load(const float* p) { return _mm256_loadu_ps(p); }
    static Floats load(const bf16* p) {
        const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
    }
    static Floats load(const fp16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
    static void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
    // To nearest, ties to even; NaN stays NaN.
    static void store(bf16* p, Floats x) {
        const __m256i bits = _mm256_castps_si256(x);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
        const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x88);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
    }
    static void store(fp16* p, Floats x) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }

    // The order depends on nothing: ((0+4)+(2+6)) + ((1+5)+(3+7)).
    static float sum(Floats x) {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
    }
    static float highest(Floats x) {
        __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        half = _mm_max_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
    }
    // The sums of eight registers, each in the same order wherever it stands.
    static void store_sums(float* p, const Floats (&x)[8]) {
        const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
        const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
        const __m256 firsts = _mm256_permute2f128_ps(low, high, 0x20);
        _mm256_storeu_ps(p, _mm256_add_ps(firsts, _mm256_permute2f128_ps(low, high, 0x31)));
    }

    // x * 2**n for whole n in [-252, 254]; in two steps, since 2**128 and 2**-150 are no floats.
    static Floats scale(Floats x, Floats n) {
        const __m256i whole = _mm256_cvtps_epi32(n);
        const __m256i half = _mm256_srai_epi32(whole, 1);
        return mul(mul(x, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)));
    }
    // x = mantissa * 2**exponent with the mantissa in [0.5, 1); x positive and normal.
    static Floats mantissa(Floats x, Floats& exponent) {
        const __m256i bits = _mm256_castps_si256(x);
        exponent = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(bits, 23), _mm256_set1_epi32(126)));
        const __m256i fraction = _mm256_and_si256(bits, _mm256_set1_epi32(0x007fffff));
        return _mm256_castsi256_ps(_mm256_or_si256(fraction, _mm256_set1_epi32(0x3f000000)));
    }
    // a where x < y, else b.
    static Floats where_less(Floats x, Floats y, Floats a, Floats b) {
        return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, y, _CMP_LT_OQ));
    }

   private:
    static Floats power_of_two(__m256i n) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
    }
};

// How `linear` reads a step of an operand: once from memory, then as `phases` registers one after the other.
template <class T>
struct Operand {  // float and fp16: widened
    using Register = __m256;
    using Raw = __m256;
    static constexpr int step = 8, phases = 1;
    static Raw load(const T* p) { return Vec::load(p); }
    template <int phase>
    static Register take(Raw raw) {
        return raw;
    }
    static Vec::Floats multiply_add(Register a, Register b, Vec::Floats sum) { return Vec::multiply_add(a, b, sum); }
};
template <>
struct Operand<bf16> {  // the even elements, then the odd ones: a shift or a mask widens them
    using Register = __m256;
    using Raw = __m256i;
    static constexpr int step = 16, phases = 2;
    static Raw load(const bf16* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    template <int phase>
    static Register take(Raw raw) {
        if constexpr (phase == 0) return _mm256_castsi256_ps(_mm256_slli_epi32(raw, 16));
        return _mm256_castsi256_ps(_mm256_and_si256(raw, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
    }
    static Vec::Floats multiply_add(Register a, Register b, Vec::Floats sum) { return Vec::multiply_add(a, b, sum); }
};

// A number for each group of kGroupWords lanes.
template <int kGroupWords>
Vec::Floats spread(const float* p) {
    if constexpr (kGroupWords >= 8) return _mm256_broadcast_ss(p);
    return _mm256_set_m128(_mm_broadcast_ss(p + 1), _mm_broadcast_ss(p));
}

// The numbers 0 to 15 less each zero as bf16, which holds them all: the upper and the lower byte, for vpshufb.
struct NibbleTables {
    alignas(16) uint8_t high[17][16] = {}, low[17][16] = {};

    constexpr NibbleTables() {
        for (int zero = 0; zero < 17; ++zero) {
            for (int i = 0; i < 16; ++i) {
                const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(i - zero));
                high[zero][i] = static_cast<uint8_t>(bits >> 24);
                low[zero][i] = static_cast<uint8_t>(bits >> 16);
            }
        }
    }
};
constexpr NibbleTables kNibbleTables;

// How `linear` reads 4-bit integers: a register of words gives eight of floats. The low and then the high nibbles of
// all bytes are looked up, upper and lower bytes of two words of each half of the register paired, even and odd pairs
// widened: 19 instructions, where a nibble shifted up, shifted down and converted takes three.
struct FloatNibbles {
    using Register = __m256;
    using Number = float;  // of a register's lanes
    static constexpr int phases = 8;
    template <int kGroupWords>
    static constexpr bool takes_zeros = true;

    // Which input feature of the words' 64 a lane of a register holds.
    static constexpr int feature(int phase, int lane) {
        const int word = lane / 4 * 4 + phase / 2 % 2 * 2 + lane % 4 / 2, byte = lane % 2 * 2 + phase % 2;
        return 8 * word + 2 * byte + phase / 4;
    }

    // function(register, phase as a type) for each, nibbles less zeros (8 without kZeros).
    template <int kGroupWords, bool kZeros, class Function>
    __attribute__((always_inline)) static void unpack(const uint32_t* words, const float* zeros,
                                                      const Function& function) {
        const __m256i high = table<kGroupWords, kZeros>(kNibbleTables.high, zeros);
        const __m256i low = table<kGroupWords, kZeros>(kNibbleTables.low, zeros);
        const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
        const __m256i mask = _mm256_set1_epi8(15);
        half<0>(_mm256_and_si256(raw, mask), high, low, function);
        half<4>(_mm256_and_si256(_mm256_srli_epi32(raw, 4), mask), high, low, function);
    }
    static Vec::Floats multiply_add(Register a, Register b, Vec::Floats sum) { return Vec::multiply_add(a, b, sum); }

   private:
    template <int kGroupWords, bool kZeros>
    __attribute__((always_inline)) static __m256i table(const uint8_t (&tables)[17][16], const float* zeros) {
        const auto of = [&](int zero) { return _mm_load_si128(reinterpret_cast<const __m128i*>(tables[zero])); };
        if constexpr (!kZeros) return _mm256_broadcastsi128_si256(of(8));
        const __m128i first = of(static_cast<int>(zeros[0]));
        if constexpr (kGroupWords >= 8) return _mm256_broadcastsi128_si256(first);
        return _mm256_set_m128i(of(static_cast<int>(zeros[1])), first);
    }
    template <int phase, class Function>
    __attribute__((always_inline)) static void half(__m256i index, __m256i high, __m256i low,
                                                    const Function& function) {
        const __m256i upper = _mm256_shuffle_epi8(high, index), lower = _mm256_shuffle_epi8(low, index);
        pair<phase>(_mm256_unpacklo_epi8(lower, upper), function);
        pair<phase + 2>(_mm256_unpackhi_epi8(lower, upper), function);
    }
    template <int phase, class Function>
    __attribute__((always_inline)) static void pair(__m256i bf16s, const Function& function) {
        function(_mm256_castsi256_ps(_mm256_slli_epi32(bf16s, 16)), std::integral_constant<int, phase>());
        const __m256i odd = _mm256_and_si256(bf16s, _mm256_set1_epi32(static_cast<int>(0xffff0000)));
        function(_mm256_castsi256_ps(odd), std::integral_constant<int, phase + 1>());
    }
};

// Tiles of `linear`, from bench/results/cpu-experiments.md; 16 registers hold the sums, the weights and an
// activation. Rows of a tile that reads weights where they lie, and its columns by rows:
constexpr int kDirectRows = 3;
constexpr int kDirectColumns[kDirectRows + 1] = {0, 8, 4, 3};
// The hardware sees eight streams come; asking for them ahead as well took a tenth.
constexpr bool kDirectPrefetch = false;
constexpr int64_t kDirectUnit = 24;  // of every number of columns a multiple
// Of a tile that reads laid out weights; from kPackedRows rows on they are.
constexpr int kPackedTileRows = 4, kPackedColumns = 3;
constexpr int64_t kPackedRows = 64;
constexpr int64_t kPackedDepth = 64;  // registers of a row that a tile takes at a time: x and weights stay in L1
constexpr int64_t kPackedBlockColumns = 48;
constexpr int64_t kGroupRows = 192;
// Likewise for weights of 4-bit integers.
constexpr int kInt4Rows = 4;
constexpr int kInt4Columns[kInt4Rows + 1] = {0, 4, 3, 2, 2};
constexpr int64_t kInt4PackedRows = 128;
