//! How fast the machine reads its memory: the ceiling of every step that reads a cache once.

use std::{thread, time::Instant};

/// A buffer that no cache of the machine holds, read by several threads at once.
pub struct MemoryProbe {
    words: Vec<u64>,
    threads: usize,
}

/// 512 MiB: beyond the last-level cache of any machine that we know.
const WORDS: usize = (512 << 20) / 8;

impl MemoryProbe {
    /// Takes and touches the buffer; `threads` as the measured sessions have.
    pub fn new(threads: usize) -> Self {
        // Not zeros: those would all be one page of the kernel's.
        let words = (0..WORDS as u64)
            .map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15))
            .collect();
        Self {
            words,
            threads: threads.max(1),
        }
    }

    /// Bytes per second of one pass over the buffer.
    pub fn pass(&self) -> f64 {
        self.read(&self.words)
    }

    /// Reads enough of it that little of what was in the caches before is left.
    pub fn flush(&self) {
        self.read(&self.words[..WORDS / 4]);
    }

    fn read(&self, words: &[u64]) -> f64 {
        let start = Instant::now();
        let share = words.len().div_ceil(self.threads);
        let sum = thread::scope(|scope| {
            let workers: Vec<_> = words.chunks(share).map(|part| scope.spawn(move || sum(part))).collect();
            // A reader cannot panic; if one did, its sum would be missing and nothing else.
            workers
                .into_iter()
                .filter_map(|w| w.join().ok())
                .fold(0, u64::wrapping_add)
        });
        std::hint::black_box(sum);
        (words.len() * 8) as f64 / start.elapsed().as_secs_f64()
    }
}

/// Loads every word; the additions of 32 lanes are vector additions, far faster than memory.
fn sum(words: &[u64]) -> u64 {
    let mut lanes = [0u64; 32];
    let (chunks, rest) = words.as_chunks::<32>();
    for chunk in chunks {
        for (lane, word) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*word);
        }
    }
    lanes.iter().chain(rest).fold(0, |a, b| a.wrapping_add(*b))
}
