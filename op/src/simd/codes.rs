//! Products of quantised queries with codes of one or two bits: sums of integers, the same with every instruction set.
//!
//! Rows lie in groups of 16. A row has `width` bytes of codes, packed from the lowest bits on. A group has the rows'
//! words of 32 bits side by side, 16 a word, then what bytes are left of each, 16 a byte: so a row is a lane of 32
//! bits, and the four bytes of a lane meet four elements of a query.

use super::Isa;

/// Rows of a group: as many as the longest vector has lanes of 32 bits.
pub(crate) const GROUP: usize = 16;

/// Queries that are multiplied at once.
pub(crate) const MOST_QUERIES: usize = 4;

/// A query's numbers are `256 high + low`, bytes each; this is the largest.
pub(crate) const LARGEST: i32 = 127 * 256;

/// Codes of some rows.
#[derive(Clone, Copy)]
pub(crate) struct Codes<'a> {
    /// Whole groups.
    pub bytes: &'a [u8],
    /// Bytes of a row.
    pub width: usize,
    /// Bits of a code, 1 or 2.
    pub bits: usize,
}

impl Codes<'_> {
    fn groups(&self) -> usize {
        self.bytes.len() / (GROUP * self.width)
    }
}

/// Words of 32 bits in each of the two parts of a query that meets rows of `width` bytes.
pub(crate) const fn query_words(width: usize, bits: usize) -> usize {
    width.div_ceil(4) * (8 / bits)
}

/// Where the parts of element `d` of a query lie: the word in each part, and the byte in it. Word `planes m + k` meets
/// word m of a row, shifted right by k codes.
pub(crate) const fn query_place(d: usize, bits: usize) -> (usize, usize) {
    let planes = 8 / bits;
    let byte = d / planes;
    (byte / 4 * planes + d % planes, byte % 4)
}

/// Where byte `byte` of row `row` of a group lies in it.
pub(crate) const fn place(width: usize, byte: usize, row: usize) -> usize {
    let word = byte / 4;
    if word < width / 4 {
        word * 4 * GROUP + row * 4 + byte % 4
    } else {
        word * 4 * GROUP + byte % 4 * GROUP + row
    }
}

/// Sets of instructions that the sums are made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CodeIsa {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 with products of bytes that add up in 32 bits.
    #[cfg(target_arch = "x86_64")]
    Vnni,
    #[cfg(target_arch = "aarch64")]
    Neon,
}

impl CodeIsa {
    /// The best one of this machine, and the portable one beside the portable vectors.
    pub fn beside(isa: Isa) -> Self {
        match isa {
            Isa::Portable => Self::Portable,
            #[cfg(target_arch = "x86_64")]
            // Where vectors of 512 bits run in halves, these instructions still do twice the work of AVX2's.
            Isa::Avx2 | Isa::Avx512 if has_vnni() => Self::Vnni,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::Avx512 => Self::Avx2,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => Self::Neon,
        }
    }

    /// All that this machine has.
    #[cfg(test)]
    pub fn all() -> Vec<Self> {
        let mut all = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if Isa::all().contains(&Isa::Avx2) {
                all.push(Self::Avx2);
            }
            if has_vnni() {
                all.push(Self::Vnni);
            }
        }
        #[cfg(target_arch = "aarch64")]
        if Isa::all().contains(&Isa::Neon) {
            all.push(Self::Neon);
        }
        all
    }
}

#[cfg(target_arch = "x86_64")]
fn has_vnni() -> bool {
    use std::arch::is_x86_feature_detected as has;
    has!("avx512f") && has!("avx512bw") && has!("avx512vnni")
}

/// `sums[i * stride + row]`: the sum over elements of query i times the row's code.
///
/// `queries`: one to [`MOST_QUERIES`], each [`query_words`] words of high bytes, then as many of low ones.
pub(crate) fn code_sums(isa: CodeIsa, codes: Codes<'_>, queries: &[&[i32]], sums: &mut [i32], stride: usize) {
    let words = query_words(codes.width, codes.bits);
    let rows = codes.groups() * GROUP;
    assert!(
        matches!(codes.bits, 1 | 2)
            && codes.bytes.len() == rows * codes.width
            && (1..=MOST_QUERIES).contains(&queries.len())
            && queries.iter().all(|q| q.len() == 2 * words)
            && sums.len() >= (queries.len() - 1) * stride + rows,
        "codes outside their buffers"
    );
    let of = |i: usize| queries[i].as_ptr();
    let out = sums.as_mut_ptr();
    // SAFETY: lengths are checked above; `of_bits` finds the instruction set where `isa` names it.
    unsafe {
        match queries.len() {
            1 => of_bits(isa, codes, [of(0)], out, stride),
            2 => of_bits(isa, codes, [of(0), of(1)], out, stride),
            3 => of_bits(isa, codes, [of(0), of(1), of(2)], out, stride),
            _ => of_bits(isa, codes, [of(0), of(1), of(2), of(3)], out, stride),
        }
    }
}

/// # Safety
/// [`code_sums`] has checked the lengths; the machine has the instruction set.
unsafe fn of_bits<const R: usize>(
    isa: CodeIsa,
    codes: Codes<'_>,
    queries: [*const i32; R],
    out: *mut i32,
    stride: usize,
) {
    // SAFETY: passed on.
    unsafe {
        match codes.bits {
            1 => of_isa::<1, R>(isa, codes, queries, out, stride),
            _ => of_isa::<2, R>(isa, codes, queries, out, stride),
        }
    }
}

/// # Safety
/// As [`of_bits`].
unsafe fn of_isa<const BITS: usize, const R: usize>(
    isa: CodeIsa,
    codes: Codes<'_>,
    queries: [*const i32; R],
    out: *mut i32,
    stride: usize,
) {
    // SAFETY: passed on.
    unsafe {
        match isa {
            CodeIsa::Portable => portable::<BITS, R>(codes, queries, out, stride),
            #[cfg(target_arch = "x86_64")]
            CodeIsa::Avx2 => x86::avx2::<BITS, R>(codes, queries, out, stride),
            #[cfg(target_arch = "x86_64")]
            CodeIsa::Vnni => x86::vnni::<BITS, R>(codes, queries, out, stride),
            #[cfg(target_arch = "aarch64")]
            CodeIsa::Neon => neon::neon::<BITS, R>(codes, queries, out, stride),
        }
    }
}

/// # Safety
/// As [`of_bits`].
unsafe fn portable<const BITS: usize, const R: usize>(
    codes: Codes<'_>,
    queries: [*const i32; R],
    out: *mut i32,
    stride: usize,
) {
    let words = query_words(codes.width, BITS);
    for (g, group) in codes.bytes.chunks_exact(GROUP * codes.width).enumerate() {
        let mut sums = [[0i32; GROUP]; R];
        for byte in 0..codes.width {
            let (word, at) = (byte / 4, byte % 4);
            let whole = word < codes.width / 4;
            let start = word * 4 * GROUP;
            for plane in 0..8 / BITS {
                let index = word * (8 / BITS) + plane;
                for (sums, query) in sums.iter_mut().zip(queries) {
                    // SAFETY: below the number of words of a part; both parts are there.
                    let (high, low) = unsafe { (*query.add(index), *query.add(words + index)) };
                    let q = i32::from(high.to_le_bytes()[at] as i8) * 256 + i32::from(low.to_le_bytes()[at] as i8);
                    for (row, sum) in sums.iter_mut().enumerate() {
                        let code = if whole {
                            group[start + row * 4 + at]
                        } else {
                            group[start + at * GROUP + row]
                        };
                        *sum += i32::from(code >> (plane * BITS) & ((1 << BITS) - 1)) * q;
                    }
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            // SAFETY: the caller's promise: there is room for the rows of every query.
            unsafe {
                out.add(r * stride + g * GROUP)
                    .copy_from_nonoverlapping(sums.as_ptr(), GROUP)
            };
        }
    }
}

/// The bytes that are left of each of `N` rows from `row` on as words.
///
/// # Safety
/// `rest` points to `GROUP` bytes for each of the `count` that are left.
#[inline(always)]
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
unsafe fn rest_words<const N: usize>(rest: *const u8, count: usize, row: usize) -> [u32; N] {
    let mut words = [0; N];
    for byte in 0..count {
        for (lane, word) in words.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *word |= u32::from(unsafe { *rest.add(byte * GROUP + row + lane) }) << (8 * byte);
        }
    }
    words
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Codes, GROUP, query_words, rest_words};

    /// Products of pairs of bytes that are added up in 16 bits: each is at most 2 * 3 * 128.
    const MOST_ADDED: usize = 40;

    /// # Safety
    /// As [`super::of_bits`].
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn avx2<const BITS: usize, const R: usize>(
        codes: Codes<'_>,
        queries: [*const i32; R],
        out: *mut i32,
        stride: usize,
    ) {
        let (planes, whole, left) = (8 / BITS, codes.width / 4, codes.width % 4);
        let words = query_words(codes.width, BITS);
        let mask = _mm256_set1_epi8((1 << BITS) - 1);
        for (g, group) in codes.bytes.chunks_exact(GROUP * codes.width).enumerate() {
            for half in 0..2 {
                // SAFETY: words of a row and of the queries' parts stay below their numbers.
                unsafe {
                    let mut total = [_mm256_setzero_si256(); R];
                    let (mut high, mut low) = ([_mm256_setzero_si256(); R], [_mm256_setzero_si256(); R]);
                    let mut added = 0;
                    for word in 0..whole + usize::from(left > 0) {
                        let at = group.as_ptr().add(word * 4 * GROUP);
                        let mut v = if word < whole {
                            _mm256_loadu_si256(at.add(half * 32).cast())
                        } else {
                            let rest = rest_words::<8>(at, left, half * 8);
                            _mm256_loadu_si256(rest.as_ptr().cast())
                        };
                        if added + planes > MOST_ADDED {
                            widen::<R>(&mut total, &mut high, &mut low);
                            added = 0;
                        }
                        for plane in 0..planes {
                            let code = _mm256_and_si256(v, mask);
                            v = if BITS == 1 {
                                _mm256_srli_epi32::<1>(v)
                            } else {
                                _mm256_srli_epi32::<2>(v)
                            };
                            let index = word * planes + plane;
                            for r in 0..R {
                                let q = _mm256_set1_epi32(*queries[r].add(index));
                                high[r] = _mm256_add_epi16(high[r], _mm256_maddubs_epi16(code, q));
                                let q = _mm256_set1_epi32(*queries[r].add(words + index));
                                low[r] = _mm256_add_epi16(low[r], _mm256_maddubs_epi16(code, q));
                            }
                        }
                        added += planes;
                    }
                    widen::<R>(&mut total, &mut high, &mut low);
                    for r in 0..R {
                        _mm256_storeu_si256(out.add(r * stride + g * GROUP + half * 8).cast(), total[r]);
                    }
                }
            }
        }
    }

    /// Adds `256 high + low` to the total.
    #[target_feature(enable = "avx2")]
    fn widen<const R: usize>(total: &mut [__m256i; R], high: &mut [__m256i; R], low: &mut [__m256i; R]) {
        let (one, many) = (_mm256_set1_epi16(1), _mm256_set1_epi16(256));
        for r in 0..R {
            let both = _mm256_add_epi32(_mm256_madd_epi16(high[r], many), _mm256_madd_epi16(low[r], one));
            total[r] = _mm256_add_epi32(total[r], both);
            (high[r], low[r]) = (_mm256_setzero_si256(), _mm256_setzero_si256());
        }
    }

    /// # Safety
    /// As [`super::of_bits`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) unsafe fn vnni<const BITS: usize, const R: usize>(
        codes: Codes<'_>,
        queries: [*const i32; R],
        out: *mut i32,
        stride: usize,
    ) {
        let groups = codes.groups();
        let mut g = 0;
        while g < groups {
            // SAFETY: passed on; there are as many groups.
            unsafe {
                if g + 2 <= groups {
                    some_groups::<BITS, R, 2>(codes, g, queries, out, stride);
                    g += 2;
                } else {
                    some_groups::<BITS, R, 1>(codes, g, queries, out, stride);
                    g += 1;
                }
            }
        }
    }

    /// G groups from `g` on: sums that do not wait for one another.
    ///
    /// # Safety
    /// As [`super::of_bits`], and the groups are there.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn some_groups<const BITS: usize, const R: usize, const G: usize>(
        codes: Codes<'_>,
        g: usize,
        queries: [*const i32; R],
        out: *mut i32,
        stride: usize,
    ) {
        let (planes, whole, left) = (8 / BITS, codes.width / 4, codes.width % 4);
        let words = query_words(codes.width, BITS);
        let mask = _mm512_set1_epi8((1 << BITS) - 1);
        let zero = _mm512_setzero_si512();
        let (mut high, mut low) = ([[zero; G]; R], [[zero; G]; R]);
        // SAFETY: words of a row and of the queries' parts stay below their numbers.
        unsafe {
            for word in 0..whole + usize::from(left > 0) {
                let mut v = [zero; G];
                for (i, v) in v.iter_mut().enumerate() {
                    let at = codes
                        .bytes
                        .as_ptr()
                        .add((g + i) * GROUP * codes.width + word * 4 * GROUP);
                    *v = if word < whole {
                        _mm512_loadu_si512(at.cast())
                    } else {
                        _mm512_loadu_si512(rest_words::<GROUP>(at, left, 0).as_ptr().cast())
                    };
                }
                for plane in 0..planes {
                    let code = v.map(|v| _mm512_and_si512(v, mask));
                    v = v.map(|v| {
                        if BITS == 1 {
                            _mm512_srli_epi32::<1>(v)
                        } else {
                            _mm512_srli_epi32::<2>(v)
                        }
                    });
                    let index = word * planes + plane;
                    for r in 0..R {
                        let (h, l) = (
                            _mm512_set1_epi32(*queries[r].add(index)),
                            _mm512_set1_epi32(*queries[r].add(words + index)),
                        );
                        for i in 0..G {
                            high[r][i] = _mm512_dpbusd_epi32(high[r][i], code[i], h);
                            low[r][i] = _mm512_dpbusd_epi32(low[r][i], code[i], l);
                        }
                    }
                }
            }
            for r in 0..R {
                for i in 0..G {
                    let sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(high[r][i]), low[r][i]);
                    _mm512_storeu_si512(out.add(r * stride + (g + i) * GROUP).cast(), sum);
                }
            }
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod neon {
    use std::arch::aarch64::*;

    use super::{Codes, GROUP, query_words, rest_words};

    /// Products of bytes that are added up in 16 bits: each is at most 3 * 128.
    const MOST_ADDED: usize = 64;

    /// # Safety
    /// As [`super::of_bits`].
    #[target_feature(enable = "neon")]
    pub(super) unsafe fn neon<const BITS: usize, const R: usize>(
        codes: Codes<'_>,
        queries: [*const i32; R],
        out: *mut i32,
        stride: usize,
    ) {
        let (planes, whole, left) = (8 / BITS, codes.width / 4, codes.width % 4);
        let words = query_words(codes.width, BITS);
        let mask = vdupq_n_s8((1 << BITS) - 1);
        for (g, group) in codes.bytes.chunks_exact(GROUP * codes.width).enumerate() {
            for quarter in 0..4 {
                // SAFETY: words of a row and of the queries' parts stay below their numbers.
                unsafe {
                    let mut total = [vdupq_n_s32(0); R];
                    // Rows 0 and 1, rows 2 and 3.
                    let (mut high, mut low) = ([[vdupq_n_s16(0); 2]; R], [[vdupq_n_s16(0); 2]; R]);
                    let mut added = 0;
                    for word in 0..whole + usize::from(left > 0) {
                        let at = group.as_ptr().add(word * 4 * GROUP);
                        let mut v = if word < whole {
                            vreinterpretq_u32_u8(vld1q_u8(at.add(quarter * 16)))
                        } else {
                            vld1q_u32(rest_words::<4>(at, left, quarter * 4).as_ptr())
                        };
                        if added + planes > MOST_ADDED {
                            widen::<R>(&mut total, &mut high, &mut low);
                            added = 0;
                        }
                        for plane in 0..planes {
                            let code = vandq_s8(vreinterpretq_s8_u32(v), mask);
                            v = if BITS == 1 {
                                vshrq_n_u32::<1>(v)
                            } else {
                                vshrq_n_u32::<2>(v)
                            };
                            let index = word * planes + plane;
                            for r in 0..R {
                                let q = vreinterpretq_s8_s32(vdupq_n_s32(*queries[r].add(index)));
                                high[r][0] = vmlal_s8(high[r][0], vget_low_s8(code), vget_low_s8(q));
                                high[r][1] = vmlal_high_s8(high[r][1], code, q);
                                let q = vreinterpretq_s8_s32(vdupq_n_s32(*queries[r].add(words + index)));
                                low[r][0] = vmlal_s8(low[r][0], vget_low_s8(code), vget_low_s8(q));
                                low[r][1] = vmlal_high_s8(low[r][1], code, q);
                            }
                        }
                        added += planes;
                    }
                    widen::<R>(&mut total, &mut high, &mut low);
                    for r in 0..R {
                        vst1q_s32(out.add(r * stride + g * GROUP + quarter * 4), total[r]);
                    }
                }
            }
        }
    }

    /// Adds `256 high + low` of each row to the total.
    #[target_feature(enable = "neon")]
    fn widen<const R: usize>(
        total: &mut [int32x4_t; R],
        high: &mut [[int16x8_t; 2]; R],
        low: &mut [[int16x8_t; 2]; R],
    ) {
        for r in 0..R {
            // A row is four neighbours.
            let rows = |x: [int16x8_t; 2]| vpaddq_s32(vpaddlq_s16(x[0]), vpaddlq_s16(x[1]));
            let both = vaddq_s32(vshlq_n_s32::<8>(rows(high[r])), rows(low[r]));
            total[r] = vaddq_s32(total[r], both);
            (high[r], low[r]) = ([vdupq_n_s16(0); 2], [vdupq_n_s16(0); 2]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Widths with and without bytes behind the last word, the largest codes and queries, and every number of queries.
    #[test]
    fn every_instruction_set_gives_the_sums() {
        for (d, bits) in [
            (8, 1),
            (8, 2),
            (12, 2),
            (20, 2),
            (80, 1),
            (80, 2),
            (128, 1),
            (128, 2),
            (256, 1),
            (256, 2),
            (320, 2),
        ] {
            let width = d * bits / 8;
            let words = query_words(width, bits);
            for (heads, groups, largest) in [(1, 1, false), (2, 2, false), (3, 5, true), (4, 8, false), (4, 3, true)] {
                let number = |i: usize| (i * 7919 + i / 31 * 104_729 + 13) % 65_537;
                let code = |row: usize, e: usize| {
                    if largest {
                        (1 << bits) - 1
                    } else {
                        number(row * d + e) as u8 % (1 << bits)
                    }
                };
                let value = |head: usize, e: usize| match (largest, head) {
                    (true, 0) => LARGEST,
                    (true, 1) => -LARGEST,
                    (true, _) => -128 - 256,
                    _ => number(head * 977 + e) as i32 % (2 * LARGEST + 1) - LARGEST,
                };
                let mut bytes = vec![0u8; groups * GROUP * width];
                for row in 0..groups * GROUP {
                    for e in 0..d {
                        let byte = e * bits / 8;
                        let place = row / GROUP * GROUP * width + place(width, byte, row % GROUP);
                        bytes[place] |= code(row, e) << (e * bits % 8);
                    }
                }
                let mut queries = vec![vec![0i32; 2 * words]; heads];
                for (head, query) in queries.iter_mut().enumerate() {
                    for e in 0..d {
                        let ((word, byte), q) = (query_place(e, bits), value(head, e));
                        let high = (q + 128) >> 8;
                        for (word, part) in [(word, high), (words + word, q - 256 * high)] {
                            query[word] |= i32::from(part as i8 as u8) << (8 * byte);
                        }
                    }
                }
                let queries: Vec<&[i32]> = queries.iter().map(Vec::as_slice).collect();
                let stride = groups * GROUP + 3;
                for isa in CodeIsa::all() {
                    let mut sums = vec![0; heads * stride];
                    let codes = Codes {
                        bytes: &bytes,
                        width,
                        bits,
                    };
                    code_sums(isa, codes, &queries, &mut sums, stride);
                    for head in 0..heads {
                        for row in 0..groups * GROUP {
                            let want: i32 = (0..d).map(|e| i32::from(code(row, e)) * value(head, e)).sum();
                            assert_eq!(
                                sums[head * stride + row],
                                want,
                                "{isa:?} {d} {bits} head {head} row {row}"
                            );
                        }
                    }
                }
            }
        }
    }
}
