//! Random draws that are the same for a seed on every machine and in every version.

use rand_mt::Mt64;

/// A source of draws.
pub struct Draw(Mt64);

impl Draw {
    /// Draws for one case of a task.
    pub fn new(seed: u64, task: u64, case: usize) -> Self {
        Self(Mt64::new_with_key([seed, task, case as u64]))
    }

    /// A fraction from 0 to less than 1.
    pub fn fraction(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A number below `end`; 0 if that is 0.
    pub fn below(&mut self, end: usize) -> usize {
        // 128 bits hold the product, whose upper half is the number.
        ((u128::from(self.0.next_u64()) * end as u128) >> 64) as usize
    }

    /// One of `from`, which must not be empty.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> Option<T> {
        from.get(self.below(from.len())).copied()
    }

    /// Brings `list` into a random order.
    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for i in (1..list.len()).rev() {
            list.swap(i, self.below(i + 1));
        }
    }

    /// `count` numbers of `digits` digits, all different.
    pub fn numbers(&mut self, count: usize, digits: u32) -> Vec<String> {
        let low = 10usize.pow(digits.saturating_sub(1));
        self.distinct(count, |draw| (low + draw.below(9 * low)).to_string())
    }

    /// `count` texts that `make` gives, all different.
    pub fn distinct(&mut self, count: usize, mut make: impl FnMut(&mut Self) -> String) -> Vec<String> {
        let mut list: Vec<String> = Vec::new();
        while list.len() < count {
            let next = make(self);
            if !list.contains(&next) {
                list.push(next);
            }
        }
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_those_of_the_seed_and_within_their_ranges() {
        let list = |seed| {
            let mut draw = Draw::new(seed, 2, 3);
            (draw.numbers(5, 7), draw.below(1000), draw.fraction())
        };
        assert_eq!(list(1), list(1));
        assert_ne!(list(1), list(2));
        let (numbers, _, fraction) = list(1);
        assert!(numbers.iter().all(|n| n.len() == 7) && (0.0..1.0).contains(&fraction));
        let mut draw = Draw::new(1, 1, 1);
        let mut seen = [0; 5];
        (0..5000).for_each(|_| seen[draw.below(5)] += 1);
        assert!(seen.iter().all(|&n| (850..1150).contains(&n)), "{seen:?}");
        let mut order: Vec<usize> = (0..50).collect();
        draw.shuffle(&mut order);
        assert_ne!(order, (0..50).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..50).collect::<Vec<_>>());
    }
}
