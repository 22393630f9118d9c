//! The loops in which a decoding step spends its time, alone, on one thread.
//!
//!     hot_loops              nanoseconds a repetition, for each instruction set
//!     hot_loops memory       the same for caches far larger than the processor's
//!     hot_loops NAME N       N repetitions of one loop, silently: what scripts/instructions counts
//!     hot_loops names        the loops' names, and the instruction set in use

use std::{
    env,
    hint::black_box,
    process::ExitCode,
    time::{Duration, Instant},
};

use half::f16;
use retro_attention::{
    method::{
        attend::{Block, PageRows, Partial, attend_pages},
        element::Element,
        group_score::group_scores,
        select::choose_pages,
    },
    selector::{
        Bounds, CacheSize, GroupScore, Moments, PageSelector, PageVectors, Scoring, SignedMoments, Sketch, Written,
        page_vectors::summarize,
    },
    simd::Isa,
};

const D: usize = 128;
const GROUP: usize = 4;
const PAGE: usize = 16;
/// Pages attended to: 2 MiB of f32 keys and values, so that a second-level cache holds them.
const PAGES: usize = 64;
/// Pages scored.
const CANDIDATES: usize = 512;

/// One loop: a repetition of it, and the bytes of cache or summaries that it reads.
struct Loop {
    run: Box<dyn FnMut(Isa)>,
    bytes: usize,
}

fn numbers(count: usize) -> Vec<f32> {
    (0..count)
        .map(|i| ((i * 7919 + 13) % 1009) as f32 / 504.0 - 1.0)
        .collect()
}

/// From the start of a cache line on, as ONNX Runtime's buffers are.
fn narrow<E: Element>(values: &[f32]) -> &'static [E] {
    let mut all = vec![E::default(); values.len() + 64 / size_of::<E>()];
    let start = all.as_ptr().align_offset(64);
    for (to, &from) in all[start..].iter_mut().zip(values) {
        *to = E::from_f32(from);
    }
    &all.leak()[start..][..values.len()]
}

/// Attention of one token to pages of `page` tokens of a cache that no processor cache holds: all, or one of every
/// `every`, at random.
fn stream<E: Element>(every: usize, page: usize) -> Loop {
    let cached = 128 << 20 >> 10;
    let (keys, values): (&[E], &[E]) = (narrow(&numbers(cached * D)), narrow(&numbers(cached * D)));
    let query = numbers(GROUP * D);
    let block = Block {
        group: GROUP,
        head_size: D,
        page_size: page,
        first_position: cached - 1,
        softcap: 0.0,
        local_window: None,
    };
    // Others from repetition to repetition, so that none is in a cache from the last one.
    let draw = move |turn: usize| -> Vec<PageRows> {
        let firsts = (0..cached / page / every).map(|i| i * every);
        let drawn = firsts.map(|first| first + ((first * 7919 + 13) % 1009 + turn) % every);
        drawn.map(|page| (page as u32, 0)).collect()
    };
    let lists: Vec<Vec<PageRows>> = (0..every).map(draw).collect();
    let (bytes, mut turn) = (lists[0].len() * 2 * page * D * size_of::<E>(), 0);
    let (mut max, mut sum, mut acc) = (vec![0.0; GROUP], vec![0.0; GROUP], vec![0.0; GROUP * D]);
    let run = move |isa| {
        let mut partial = Partial {
            max: &mut max,
            sum: &mut sum,
            acc: &mut acc,
        };
        partial.clear();
        turn += 1;
        let pages = &lists[turn % every];
        attend_pages(isa, &block, black_box(&query), keys, values, pages, &mut partial);
        black_box(&partial.acc);
    };
    Loop {
        run: Box::new(run),
        bytes,
    }
}

/// Attention of the newest token and `tokens - 1` before it, of which one in four pages is new to each.
fn attend<E: Element>(tokens: usize) -> Loop {
    let cached = PAGES * PAGE;
    let (keys, values): (&[E], &[E]) = (narrow(&numbers(cached * D)), narrow(&numbers(cached * D)));
    let rows = tokens * GROUP;
    let query = numbers(rows * D);
    let block = Block {
        group: GROUP,
        head_size: D,
        page_size: PAGE,
        first_position: cached - tokens,
        softcap: 0.0,
        local_window: None,
    };
    let pages: Vec<PageRows> = (0..PAGES)
        .map(|page| {
            let first = if page % 4 == 0 { page / 4 % tokens } else { tokens - 1 };
            (page as u32, (first * GROUP) as u32)
        })
        .collect();
    let (mut max, mut sum, mut acc) = (vec![0.0; rows], vec![0.0; rows], vec![0.0; rows * D]);
    let run = move |isa| {
        let mut partial = Partial {
            max: &mut max,
            sum: &mut sum,
            acc: &mut acc,
        };
        partial.clear();
        attend_pages(isa, &block, black_box(&query), keys, values, &pages, &mut partial);
        black_box(&partial.acc);
    };
    Loop {
        run: Box::new(run),
        bytes: 2 * cached * D * size_of::<E>(),
    }
}

fn scoring(group_score: GroupScore, page_size: usize, sketch_bits: usize) -> Scoring {
    Scoring {
        group_score,
        scale: 0.09,
        lambda: 2.5,
        correlation: 0.2,
        page_size,
        head_size: D,
        len: CANDIDATES * PAGE,
        softcap: 0.0,
        local_window: None,
        sketch_bits,
    }
}

/// As many tokens as in [`score`], in pages of `page` tokens.
fn sketch<E: Element>(bits: usize, page: usize, group_score: GroupScore) -> Loop {
    let tokens = CANDIDATES * PAGE;
    let (size, keys) = (sketch_size::<E>(bits), narrow::<E>(&numbers(tokens * D)));
    let mut state = vec![0; Sketch::layout(&size).len()];
    let written = Written {
        from: 0,
        appended: 0,
        len: tokens,
    };
    Sketch::update::<E>(&size, written, keys, &mut state, &mut Vec::new());
    let (query, count) = (numbers(GROUP * D), tokens / page);
    let scoring = scoring(group_score, page, bits);
    let (mut prepared, mut heads, mut scores) = (Vec::new(), vec![0.0; GROUP * count], vec![0.0; count]);
    let bytes = state.len();
    let run = move |isa| {
        Sketch::prepare(&scoring, black_box(&query), &mut prepared);
        Sketch::score_heads::<E>(isa, &scoring, &prepared, &state, 0..count, &mut heads);
        group_scores::<Sketch>(isa, &scoring, &mut heads, 0..count, &mut scores);
        black_box(&scores);
    };
    Loop {
        run: Box::new(run),
        bytes,
    }
}

/// Scores of tokens in pages of 8 whose sketches no processor cache holds: others from repetition to repetition.
fn sketch_stream<E: Element>(bits: usize) -> Loop {
    let tokens = CANDIDATES * PAGE;
    let (size, keys) = (sketch_size::<E>(bits), narrow::<E>(&numbers(tokens * D)));
    let mut part = vec![0; Sketch::layout(&size).len()];
    let written = Written {
        from: 0,
        appended: 0,
        len: tokens,
    };
    Sketch::update::<E>(&size, written, keys, &mut part, &mut Vec::new());
    let (parts, count) = (64, tokens / 8);
    let state = part.repeat(parts);
    let scoring = Scoring {
        len: parts * tokens,
        ..scoring(GroupScore::Softmax, 8, bits)
    };
    let query = numbers(GROUP * D);
    let (mut prepared, mut heads, mut turn) = (Vec::new(), vec![0.0; GROUP * count], 0);
    let run = move |isa| {
        let first = turn * count;
        turn = (turn + 1) % parts;
        Sketch::prepare(&scoring, black_box(&query), &mut prepared);
        Sketch::score_heads::<E>(isa, &scoring, &prepared, &state, first..first + count, &mut heads);
        black_box(&heads);
    };
    Loop {
        run: Box::new(run),
        bytes: part.len(),
    }
}

fn sketch_size<E>(sketch_bits: usize) -> CacheSize {
    CacheSize {
        capacity: CANDIDATES * PAGE,
        pages: CANDIDATES,
        page_size: PAGE,
        head_size: D,
        sketch_bits,
        cache_element: size_of::<E>(),
    }
}

/// The sketches of a page's rows.
fn sketch_rows(bits: usize) -> Loop {
    let size = sketch_size::<f32>(bits);
    let (keys, mut state, mut scratch) = (numbers(PAGE * D), vec![0; Sketch::layout(&size).len()], Vec::new());
    let written = Written {
        from: 0,
        appended: 0,
        len: PAGE,
    };
    let run = move |_| {
        Sketch::update::<f32>(&size, written, black_box(&keys), &mut state, &mut scratch);
        black_box(&state);
    };
    Loop {
        run: Box::new(run),
        bytes: PAGE * D * 4,
    }
}

fn score<E: Element, P: PageSelector<State<E> = E>>(group_score: GroupScore) -> Loop {
    let summary: &[E] = narrow(&numbers(CANDIDATES * 2 * D));
    let query = numbers(GROUP * D);
    let scoring = scoring(group_score, PAGE, 2);
    let (mut prepared, mut heads, mut scores) = (Vec::new(), vec![0.0; GROUP * CANDIDATES], vec![0.0; CANDIDATES]);
    let run = move |isa| {
        P::prepare(&scoring, black_box(&query), &mut prepared);
        P::score_heads::<E>(isa, &scoring, &prepared, summary, 0..CANDIDATES, &mut heads);
        group_scores::<P>(isa, &scoring, &mut heads, 0..CANDIDATES, &mut scores);
        black_box(&scores);
    };
    Loop {
        run: Box::new(run),
        bytes: CANDIDATES * 2 * D * size_of::<E>(),
    }
}

fn choose() -> Loop {
    let scores = numbers(CANDIDATES);
    let (mut order, mut selected) = (Vec::new(), Vec::new());
    let run = move |_| {
        choose_pages(black_box(&scores), 0..CANDIDATES, 1, PAGES, &mut order, &mut selected);
        black_box(&selected);
    };
    Loop {
        run: Box::new(run),
        bytes: CANDIDATES * 4,
    }
}

fn summary<V: PageVectors>() -> Loop {
    let rows = numbers(PAGE * D);
    let (mut out, mut scratch) = (vec![0.0; 2 * D], Vec::new());
    let run = move |_| {
        summarize::<V, f32>(black_box(&rows), &mut out, &mut scratch);
        black_box(&out);
    };
    Loop {
        run: Box::new(run),
        bytes: PAGE * D * 4,
    }
}

/// A loop's name, and how to make it.
type Named = (&'static str, fn() -> Loop);

fn loops() -> Vec<Named> {
    use GroupScore::{Max, Softmax};
    vec![
        ("attend-f32-w1", || attend::<f32>(1)),
        ("attend-f32-w8", || attend::<f32>(8)),
        ("attend-f16-w1", || attend::<f16>(1)),
        ("score-f32-bounds-max", || score::<f32, Bounds>(Max)),
        ("score-f32-moments-softmax", || score::<f32, Moments>(Softmax)),
        ("score-f32-signed-softmax", || score::<f32, SignedMoments>(Softmax)),
        ("score-f16-bounds-max", || score::<f16, Bounds>(Max)),
        ("score-f32-sketch-2-pages-16", || sketch::<f32>(2, 16, Softmax)),
        ("score-f32-sketch-2-pages-8", || sketch::<f32>(2, 8, Softmax)),
        ("score-f32-sketch-2-pages-4", || sketch::<f32>(2, 4, Softmax)),
        ("score-f32-sketch-2-tokens", || sketch::<f32>(2, 1, Softmax)),
        ("score-f16-sketch-1-pages-8", || sketch::<f16>(1, 8, Max)),
        ("choose", choose),
        ("summarize-bounds", summary::<Bounds>),
        ("summarize-moments", summary::<Moments>),
        ("summarize-signed", summary::<SignedMoments>),
        ("sketch-rows-1", || sketch_rows(1)),
        ("sketch-rows-2", || sketch_rows(2)),
    ]
}

/// Loops whose caches no processor cache holds.
fn memory_loops() -> Vec<Named> {
    vec![
        ("stream-f32", || stream::<f32>(1, PAGE)),
        ("stream-f32-quarter", || stream::<f32>(4, PAGE)),
        ("stream-f32-twentieth", || stream::<f32>(20, PAGE)),
        ("stream-f32-twentieth-pages-8", || stream::<f32>(20, 8)),
        ("stream-f32-twentieth-pages-4", || stream::<f32>(20, 4)),
        ("stream-f32-twentieth-tokens", || stream::<f32>(20, 1)),
        ("stream-f32-sketch-2-pages-8", || sketch_stream::<f32>(2)),
        ("stream-f16", || stream::<f16>(1, PAGE)),
        ("stream-f16-quarter", || stream::<f16>(4, PAGE)),
        ("stream-f16-twentieth-pages-4", || stream::<f16>(20, 4)),
    ]
}

/// The fastest of many repetitions, each far shorter than a scheduler's turn: a busy machine disturbs most, not all.
fn time(loops: Vec<Named>) {
    println!("{:28}{:>12}{:>12}{:>10}", "loop", "isa", "ns", "GB/s");
    for (name, make) in loops {
        let mut l = make();
        for &isa in Isa::all() {
            let mut best = Duration::MAX;
            for _ in 0..if l.bytes > 1 << 24 { 15 } else { 300 } {
                let start = Instant::now();
                (l.run)(isa);
                best = best.min(start.elapsed());
            }
            let (ns, isa) = (best.as_nanos(), format!("{isa:?}"));
            println!("{name:28}{isa:>12}{ns:>12}{:>10.1}", l.bytes as f64 / ns.max(1) as f64);
        }
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        [] => time(loops()),
        ["memory"] => time(memory_loops()),
        ["names"] => {
            println!("{:?}", Isa::detect());
            loops().iter().for_each(|(name, _)| println!("{name}"));
        }
        [name, count] => {
            let (found, count) = (loops().into_iter().find(|l| l.0 == name), count.parse());
            let (Some((_, make)), Ok(count)) = (found, count) else {
                eprintln!("error: no loop {name:?}, or {:?} is no number", arguments[1]);
                return ExitCode::FAILURE;
            };
            let mut found = make();
            (0..count).for_each(|_: u32| (found.run)(Isa::detect()));
        }
        _ => {
            eprintln!("error: expected nothing, \"names\", or a loop's name and a number of repetitions");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
