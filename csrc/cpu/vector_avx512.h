// Sixteen floats in a register: AVX-512 F, BW, DQ and VL. Included inside the namespace and target of one translation
// unit; with WITH_AVX512_BF16 `linear` multiplies bf16 by vdpbf16ps.
struct Vec {
    using Floats = __m512;
    static constexpr int lanes = 16;

    static Floats zero() { return _mm512_setzero_ps(); }
    static Floats broadcast(float x) { return _mm512_set1_ps(x); }
    static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
    static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
    static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    // The second operand where either is NaN.
    static Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
    static Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
    static Floats round(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

    static Floats load(const float* p) { return _mm512_loadu_ps(p); }
    static Floats load(const bf16* p) {
        const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
    }
    static Floats load(const fp16* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
    // To nearest, ties to even; NaN stays NaN. (vcvtneps2bf16 would flush subnormals.)
    static void store(bf16* p, Floats x) {
        const __m512i bits = _mm512_castps_si512(x);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        const __m512i kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
    }
    static void store(fp16* p, Floats x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }

    // The two halves' sum, then as eight lanes are summed.
    static float sum(Floats x) {
        const __m256 folded = fold(x);
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(folded), _mm256_extractf128_ps(folded, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
    }
    static float highest(Floats x) { return _mm512_reduce_max_ps(x); }
    // The sums of eight registers, each in the same order wherever it stands.
    static void store_sums(float* p, const Floats (&x)[8]) {
        const __m256 low =
            _mm256_hadd_ps(_mm256_hadd_ps(fold(x[0]), fold(x[1])), _mm256_hadd_ps(fold(x[2]), fold(x[3])));
        const __m256 high =
            _mm256_hadd_ps(_mm256_hadd_ps(fold(x[4]), fold(x[5])), _mm256_hadd_ps(fold(x[6]), fold(x[7])));
        const __m256 firsts = _mm256_permute2f128_ps(low, high, 0x20);
        _mm256_storeu_ps(p, _mm256_add_ps(firsts, _mm256_permute2f128_ps(low, high, 0x31)));
    }

    // x * 2**n for whole n.
    static Floats scale(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }
    // x = mantissa * 2**exponent with the mantissa in [0.5, 1); x positive and normal.
    static Floats mantissa(Floats x, Floats& exponent) {
        exponent = add(_mm512_getexp_ps(x), broadcast(1.0f));
        return _mm512_getmant_ps(x, _MM_MANT_NORM_p5_1, _MM_MANT_SIGN_src);
    }
    // a where x < y, else b.
    static Floats where_less(Floats x, Floats y, Floats a, Floats b) {
        return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, y, _CMP_LT_OQ), b, a);
    }

   private:
    static __m256 fold(Floats x) { return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)); }
};

// How `linear` reads a step of an operand: once from memory, then as `phases` registers one after the other.
template <class T>
struct Operand {  // float and fp16: widened
    using Register = __m512;
    using Raw = __m512;
    static constexpr int step = 16, phases = 1;
    static Raw load(const T* p) { return Vec::load(p); }
    template <int phase>
    static Register take(Raw raw) {
        return raw;
    }
    static Vec::Floats multiply_add(Register a, Register b, Vec::Floats sum) { return Vec::multiply_add(a, b, sum); }
};
#ifdef WITH_AVX512_BF16
template <>
struct Operand<bf16> {  // vdpbf16ps: products of neighbours, added to one lane; subnormals count as zeros
    using Register = __m512bh;
    using Raw = __m512bh;
    static constexpr int step = 32, phases = 1;
    static Raw load(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }  // the same bits
    template <int phase>
    static Register take(Raw raw) {
        return raw;
    }
    static Vec::Floats multiply_add(Register a, Register b, Vec::Floats sum) { return _mm512_dpbf16_ps(sum, a, b); }
};
#else
template <>
struct Operand<bf16> {  // the even elements, then the odd ones: a shift or a mask widens them
    using Register = __m512;
    using Raw = __m512i;
    static constexpr int step = 32, phases = 2;
    static Raw load(const bf16* p) { return _mm512_loadu_si512(p); }
    template <int phase>
    static Register take(Raw raw) {
        if constexpr (phase == 0) return _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16));
        return _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
    }
    static Vec::Floats multiply_add(Register a, Register b, Vec::Floats sum) { return Vec::multiply_add(a, b, sum); }
};
#endif

// A number for each group of kGroupWords lanes.
template <int kGroupWords>
Vec::Floats spread(const float* p) {
    if constexpr (kGroupWords == 16) return _mm512_set1_ps(*p);
    if constexpr (kGroupWords == 8) return _mm512_mask_broadcastss_ps(_mm512_set1_ps(*p), 0xff00, _mm_load_ss(p + 1));
    const __m512i group = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    return _mm512_permutexvar_ps(group, _mm512_castps128_ps512(_mm_loadu_ps(p)));
}

// The numbers 0 to 15 less each zero, for vpermps and vpermw. These look at the low 4 and 5 bits of an index only, so
// that a shift alone takes a nibble out; bf16s' second half repeats the first.
struct NibbleTables {
    alignas(64) float floats[17][16] = {};
    alignas(64) uint16_t bf16s[17][32] = {};

    constexpr NibbleTables() {
        for (int zero = 0; zero < 17; ++zero) {
            for (int i = 0; i < 32; ++i) {
                const float value = static_cast<float>(i % 16 - zero);
                floats[zero][i % 16] = value;
                bf16s[zero][i] = static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);  // nothing is cut off
            }
        }
    }
};
constexpr NibbleTables kNibbleTables;

// function(i, as a type) for i = 0, ..., count - 1.
template <int count, class Function>
__attribute__((always_inline)) inline void unrolled(const Function& function) {
    if constexpr (count > 0) {
        unrolled<count - 1>(function);
        function(std::integral_constant<int, count - 1>());
    }
}

// How `linear` reads 4-bit integers: a register of words gives one of floats for each nibble, from the lowest.
struct FloatNibbles {
    using Register = __m512;
    using Number = float;  // of a register's lanes
    static constexpr int phases = 8;
    template <int kGroupWords>
    static constexpr bool takes_zeros = true;

    // Which input feature of the words' 128 a lane of a register holds.
    static constexpr int feature(int phase, int lane) { return 8 * lane + phase; }

    // function(register, phase as a type) for each, nibbles less zeros (8 without kZeros).
    template <int kGroupWords, bool kZeros, class Function>
    __attribute__((always_inline)) static void unpack(const uint32_t* words, const float* zeros,
                                                      const Function& function) {
        constexpr bool one_zero = kZeros && kGroupWords == 16;
        const int zero = one_zero ? static_cast<int>(*zeros) : kZeros ? 0 : 8;
        const Register table = _mm512_load_ps(kNibbleTables.floats[zero]);
        const __m512i raw = _mm512_loadu_si512(words);
        unrolled<phases>([&](auto phase) __attribute__((always_inline)) {
            const Register value = _mm512_permutexvar_ps(_mm512_srli_epi32(raw, 4 * phase()), table);
            if constexpr (kZeros && !one_zero) {
                function(_mm512_sub_ps(value, spread<kGroupWords>(zeros)), phase);
            } else {
                function(value, phase);
            }
        });
    }
    static Vec::Floats multiply_add(Register a, Register b, Vec::Floats sum) { return Vec::multiply_add(a, b, sum); }
};

#ifdef WITH_AVX512_BF16
// Half a word in each of 32 lanes; one table serves them all, so groups of fewer than 128 have no zeros of their own.
struct Bf16Nibbles {
    using Register = __m512bh;
    using Number = bf16;
    static constexpr int phases = 4;
    template <int kGroupWords>
    static constexpr bool takes_zeros = kGroupWords == 16;

    static constexpr int feature(int phase, int lane) { return 4 * lane + phase; }

    template <int kGroupWords, bool kZeros, class Function>
    __attribute__((always_inline)) static void unpack(const uint32_t* words, const float* zeros,
                                                      const Function& function) {
        const __m512i table = _mm512_load_si512(kNibbleTables.bf16s[kZeros ? static_cast<int>(*zeros) : 8]);
        const __m512i raw = _mm512_loadu_si512(words);
        unrolled<phases>([&](auto phase) __attribute__((always_inline)) {
            const __m512i index = _mm512_srli_epi16(raw, 4 * phase());
            function((__m512bh)_mm512_permutexvar_epi16(index, table), phase);
        });
    }
    static Vec::Floats multiply_add(Register a, Register b, Vec::Floats sum) { return _mm512_dpbf16_ps(sum, a, b); }
};
#endif

// Tiles of `linear`; 32 registers hold the sums, the weights and an activation. Rows of a tile that reads weights where
// they lie, and its columns by rows:
constexpr int kDirectRows = 5;
constexpr int kDirectColumns[kDirectRows + 1] = {0, 8, 8, 6, 5, 5};
constexpr bool kDirectPrefetch = true;
constexpr int64_t kDirectUnit = 120;  // of every number of columns a multiple
// Of a tile that reads laid out weights; from kPackedRows rows on they are.
constexpr int kPackedTileRows = 5, kPackedColumns = 5;
constexpr int64_t kPackedRows = 16;
constexpr int64_t kPackedDepth = 32;  // registers of a row that a tile takes at a time: x and weights stay in L1
constexpr int64_t kPackedBlockColumns = 60;
constexpr int64_t kGroupRows = 160;
// Likewise for weights of 4-bit integers.
constexpr int kInt4Rows = 5;
constexpr int kInt4Columns[kInt4Rows + 1] = {0, 6, 4, 3, 3, 2};
constexpr int64_t kInt4PackedRows = 16;
