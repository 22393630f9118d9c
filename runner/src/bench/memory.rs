//! The machine's read bandwidth: an upper bound for every step that reads a cache once.

use std::{thread, time::Instant};

/// A buffer larger than the CPU's caches, read by several threads.
pub struct MemoryProbe {
    words: Vec<u64>,
    threads: usize,
}

/// 512 MiB: larger than last-level caches.
const WORDS: usize = (512 << 20) / 8;

impl MemoryProbe {
    /// Allocates and fills the buffer; `threads`: as many as the measured sessions have.
    pub fn new(threads: usize) -> Self {
        // Not zeros: the kernel maps those to one shared page.
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

    /// Evicts the CPU's caches by reading a part of the buffer.
    pub fn flush(&self) {
        self.read(&self.words[..WORDS / 4]);
    }

    fn read(&self, words: &[u64]) -> f64 {
        let start = Instant::now();
        let share = words.len().div_ceil(self.threads);
        let sum = thread::scope(|scope| {
            let workers: Vec<_> = words.chunks(share).map(|part| scope.spawn(move || sum(part))).collect();
            // Readers do not panic.
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
