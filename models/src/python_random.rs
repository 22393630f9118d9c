//! CPython's random numbers: the Mersenne Twister, and what `random`, `sample` and `shuffle` make of it.

use std::collections::HashSet;

use rand_mt::Mt;

/// CPython's `random.Random(seed)`.
pub struct Random(Mt);

impl Random {
    /// As `random.Random(seed)`.
    pub fn new(seed: u64) -> Self {
        // The seed's 32-bit words, lowest first, at least one.
        let words = [seed as u32, (seed >> 32) as u32];
        let used = if words[1] == 0 { 1 } else { 2 };
        Self(Mt::new_with_key(words.into_iter().take(used)))
    }

    /// `random()`: 53 bits in [0, 1).
    pub fn unit(&mut self) -> f64 {
        let (a, b) = (self.0.next_u32() >> 5, self.0.next_u32() >> 6);
        (f64::from(a) * 67_108_864.0 + f64::from(b)) / 9_007_199_254_740_992.0
    }

    /// `_randbelow(n)`, n at least 1 and below 2^32.
    fn below(&mut self, n: usize) -> usize {
        let bits = usize::BITS - n.leading_zeros();
        loop {
            let r = (self.0.next_u32() >> (32 - bits.min(32))) as usize;
            if r < n {
                return r;
            }
        }
    }

    /// The recipe's own draw: `low + int(random() * (high - low + 1))`.
    pub fn between(&mut self, (low, high): (usize, usize)) -> usize {
        low + (self.unit() * (high - low + 1) as f64) as usize
    }

    /// The recipe's own choice: `list[int(random() * len(list))]`.
    pub fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[(self.unit() * list.len() as f64) as usize]
    }

    /// `sample(population, k)`, k at most the population.
    pub fn sample<T: Copy>(&mut self, population: &[T], k: usize) -> Vec<T> {
        let n = population.len();
        let mut set_size = 21;
        if k > 5 {
            set_size += 4usize.pow(((k as f64 * 3.0).ln() / 4f64.ln()).ceil() as u32);
        }
        if n <= set_size {
            let mut pool = population.to_vec();
            return (0..k)
                .map(|i| {
                    let j = self.below(n - i);
                    let taken = pool[j];
                    pool[j] = pool[n - i - 1];
                    taken
                })
                .collect();
        }
        let mut taken = HashSet::new();
        (0..k)
            .map(|_| {
                loop {
                    let j = self.below(n);
                    if taken.insert(j) {
                        return population[j];
                    }
                }
            })
            .collect()
    }

    /// `shuffle(list)`
    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for i in (1..list.len()).rev() {
            let j = self.below(i + 1);
            list.swap(i, j);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// First numbers of CPython's `random.Random(4242)` and of `random.Random(2**40 + 7)`.
    #[test]
    fn numbers_are_those_of_python() {
        let mut random = Random::new(4242);
        assert_eq!(
            [random.unit(), random.unit()],
            [0.8624508153567833, 0.41569372364698065]
        );
        let mut random = Random::new((1 << 40) + 7);
        assert_eq!(random.unit(), 0.6137037779936511);
        let mut random = Random::new(1);
        assert_eq!(random.sample(&(0..100).collect::<Vec<_>>(), 5), [17, 72, 97, 8, 32]);
        let mut list: Vec<i32> = (0..8).collect();
        random.shuffle(&mut list);
        assert_eq!(list, [7, 2, 0, 4, 5, 6, 3, 1]);
    }
}
