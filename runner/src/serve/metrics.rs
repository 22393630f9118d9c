//! Figures for Prometheus.

use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

/// A request's end.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Outcome {
    /// `stop`, `length`, `cancelled`, `refused` or `failed`.
    pub outcome: &'static str,
}

/// What the server has done. The handles are shared: each can be counted up from any thread.
pub struct Metrics {
    registry: Registry,
    /// Requests by how they ended.
    pub requests: Family<Outcome, Counter>,
    /// Requests that wait for a slot.
    pub waiting: Gauge,
    /// Slots with a request.
    pub slots_busy: Gauge,
    /// Slots.
    pub slots: Gauge,
    /// Tokens of prompts that were read.
    pub prompt_tokens: Counter,
    /// Tokens of prompts that a slot held already.
    pub cached_tokens: Counter,
    /// Tokens generated.
    pub generated_tokens: Counter,
    /// Tokens that the slots hold.
    pub cache_tokens: Gauge,
    /// Tokens that the slots can hold.
    pub cache_capacity: Gauge,
    /// Decoding steps.
    pub steps: Counter,
    /// Decoding steps that replayed a CUDA graph.
    pub steps_captured: Counter,
    /// Pages loaded per KV head, summed over KV heads, layers and steps.
    pub pages_read: Counter<f64, AtomicU64>,
    /// Pages that were there to be loaded, likewise.
    pub pages_valid: Counter<f64, AtomicU64>,
    /// Seconds from a request to its first token.
    pub first_token: Histogram,
    /// Seconds between two tokens of an answer, on average.
    pub per_token: Histogram,
}

/// Upper bounds of the histograms' buckets, in seconds.
const FIRST_TOKEN: [f64; 12] = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
const PER_TOKEN: [f64; 10] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0];

impl Default for Metrics {
    fn default() -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("retro"),
            requests: Family::default(),
            waiting: Gauge::default(),
            slots_busy: Gauge::default(),
            slots: Gauge::default(),
            prompt_tokens: Counter::default(),
            cached_tokens: Counter::default(),
            generated_tokens: Counter::default(),
            cache_tokens: Gauge::default(),
            cache_capacity: Gauge::default(),
            steps: Counter::default(),
            steps_captured: Counter::default(),
            pages_read: Counter::default(),
            pages_valid: Counter::default(),
            first_token: Histogram::new(FIRST_TOKEN),
            per_token: Histogram::new(PER_TOKEN),
        };
        metrics.register();
        metrics
    }
}

impl Metrics {
    fn register(&mut self) {
        let r = &mut self.registry;
        r.register("requests", "Requests by how they ended", self.requests.clone());
        r.register(
            "requests_waiting",
            "Requests that wait for a slot",
            self.waiting.clone(),
        );
        r.register("slots_busy", "Slots with a request", self.slots_busy.clone());
        r.register("slots", "Slots", self.slots.clone());
        r.register(
            "prompt_tokens",
            "Tokens of prompts that were read",
            self.prompt_tokens.clone(),
        );
        let cached = "Tokens of prompts that a slot held already";
        r.register("prompt_tokens_cached", cached, self.cached_tokens.clone());
        r.register("generated_tokens", "Tokens generated", self.generated_tokens.clone());
        r.register("cache_tokens", "Tokens that the slots hold", self.cache_tokens.clone());
        let capacity = "Tokens that the slots can hold";
        r.register("cache_capacity_tokens", capacity, self.cache_capacity.clone());
        r.register("steps", "Decoding steps of all slots together", self.steps.clone());
        let captured = "Those of them that replayed a CUDA graph";
        r.register("steps_captured", captured, self.steps_captured.clone());
        let read = "Pages loaded, summed over KV heads, layers and steps";
        r.register("pages_read", read, self.pages_read.clone());
        let valid = "Pages that were there to be loaded, summed likewise";
        r.register("pages_valid", valid, self.pages_valid.clone());
        let first = "Time from a request to its first token";
        r.register_with_unit("time_to_first_token", first, Unit::Seconds, self.first_token.clone());
        let each = "Time between two tokens of an answer, its mean";
        r.register_with_unit("time_per_token", each, Unit::Seconds, self.per_token.clone());
    }

    /// Counts a request that has ended.
    pub fn ended(&self, outcome: &'static str) {
        self.requests.get_or_create(&Outcome { outcome }).inc();
    }

    /// The figures in Prometheus' text format.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _: std::fmt::Result = encode(&mut text, &self.registry);
        text
    }
}

/// A counter of requests that wait, shared between who asks and who serves.
#[derive(Default)]
pub(super) struct Waiting(AtomicU64);

impl Waiting {
    /// Takes `count` places, unless more than `most` were taken then; gives how many are.
    pub fn enter(&self, count: u64, most: u64) -> Result<(), u64> {
        let more = |now: u64| now.checked_add(count).filter(|&sum| sum <= most);
        self.0
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, more)
            .map(|_| ())
    }

    /// Gives `count` places back.
    pub fn leave(&self, count: u64) {
        self.0.fetch_sub(count, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_come_in_prometheus_format() {
        let metrics = Metrics::default();
        metrics.ended("stop");
        metrics.generated_tokens.inc_by(7);
        metrics.pages_read.inc_by(2.5);
        metrics.first_token.observe(0.02);
        let text = metrics.text();
        for line in [
            "retro_requests_total{outcome=\"stop\"} 1",
            "retro_generated_tokens_total 7",
            "retro_pages_read_total 2.5",
            "retro_time_to_first_token_seconds_bucket{le=\"0.025\"} 1",
            "retro_slots 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
    }

    #[test]
    fn no_more_wait_than_may() {
        let waiting = Waiting::default();
        assert_eq!(waiting.enter(3, 4), Ok(()));
        assert_eq!(waiting.enter(2, 4), Err(3));
        assert_eq!(waiting.enter(1, 4), Ok(()));
        waiting.leave(4);
        assert_eq!(waiting.enter(u64::MAX, 4), Err(0));
    }
}
