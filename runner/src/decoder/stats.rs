//! Statistics of a generation.

use std::time::Duration;

use serde::Serialize;

use crate::decoder::page_reads::PageReads;

/// Statistics of one generation or of a batch. Times exclude measuring and printing.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// Tokens of the prompts.
    pub prompt_tokens: usize,
    /// Prefill time.
    pub prompt_time: Duration,
    /// Time from the start of the prefill to the first token; `None` if there was none.
    pub first_token: Option<Duration>,
    /// Generated tokens.
    pub generated_tokens: usize,
    /// Generated tokens that took a decoding step: all but the first, which the prefill gives.
    pub decoded_tokens: usize,
    /// Time of the decoding steps and of sampling.
    pub decode_time: Duration,
    /// The rectifying passes, whose time is part of that; `None` where there were to be none.
    pub passes: Option<Passes>,
    /// What the steps read.
    pub reading: PageReads,
    /// Bytes of keys and values.
    pub kv_bytes: usize,
    /// Bytes of other state.
    pub state_bytes: usize,
}

/// Rectifying passes: how many, and their time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Passes {
    /// Their number.
    pub count: usize,
    /// The time that they took.
    pub time: Duration,
}

impl Passes {
    /// Counts a pass.
    pub fn add(&mut self, time: Duration) {
        self.count += 1;
        self.time += time;
    }
}

/// [`Stats`] as a JSON object.
#[derive(Serialize)]
pub struct StatsJson {
    /// [`Stats::prompt_tokens`].
    pub prompt_tokens: usize,
    /// [`Stats::prompt_rate`].
    pub prompt_tokens_per_second: Option<f64>,
    /// [`Stats::first_token`], in milliseconds.
    pub time_to_first_token_ms: Option<f64>,
    /// [`Stats::generated_tokens`].
    pub generated_tokens: usize,
    /// [`Stats::decode_rate`].
    pub decode_tokens_per_second: Option<f64>,
    /// Rectifying passes; none without `--rectify`.
    pub rectify_passes: Option<usize>,
    /// Their time in milliseconds, which is part of decoding.
    pub rectify_ms: Option<f64>,
    /// [`PageReads::pages`].
    pub pages_per_kv_head_and_step: Option<f64>,
    /// [`PageReads::share`].
    pub share_of_valid_pages: Option<f64>,
    /// [`PageReads::exposure`].
    pub effective_exposure: Option<f64>,
    /// [`Stats::kv_bytes`], in MiB.
    pub kv_mib: f64,
    /// [`Stats::state_bytes`], in MiB.
    pub state_mib: f64,
}

const MIB: f64 = (1 << 20) as f64;

impl Stats {
    /// Tokens of the prompt per second.
    pub fn prompt_rate(&self) -> Option<f64> {
        rate(self.prompt_tokens, self.prompt_time)
    }

    /// Tokens decoded per second, all sequences together.
    pub fn decode_rate(&self) -> Option<f64> {
        rate(self.decoded_tokens, self.decode_time)
    }

    /// The statistics as a JSON object.
    pub fn json(&self) -> StatsJson {
        StatsJson {
            prompt_tokens: self.prompt_tokens,
            prompt_tokens_per_second: self.prompt_rate(),
            time_to_first_token_ms: self.first_token.map(|t| t.as_secs_f64() * 1e3),
            generated_tokens: self.generated_tokens,
            decode_tokens_per_second: self.decode_rate(),
            rectify_passes: self.passes.map(|p| p.count),
            rectify_ms: self.passes.map(|p| p.time.as_secs_f64() * 1e3),
            pages_per_kv_head_and_step: self.reading.pages(),
            share_of_valid_pages: self.reading.share(),
            effective_exposure: self.reading.exposure(),
            kv_mib: self.kv_bytes as f64 / MIB,
            state_mib: self.state_bytes as f64 / MIB,
        }
    }

    /// Three lines for the user, and one of rectifying passes.
    pub fn lines(&self) -> Vec<String> {
        let rate = |r: Option<f64>| r.map_or_else(|| "-".to_owned(), |r| format!("{r:.1}"));
        let first = self.first_token.map_or_else(String::new, |t| {
            format!("; first token after {:.0} ms", t.as_secs_f64() * 1e3)
        });
        let mut lines = vec![
            format!(
                "prompt {} tokens, {} tokens/s{first}",
                self.prompt_tokens,
                rate(self.prompt_rate()),
            ),
            format!(
                "generated {} tokens, {} tokens/s",
                self.generated_tokens,
                rate(self.decode_rate())
            ),
        ];
        let mut memory = format!("KV cache {:.1} MiB", self.kv_bytes as f64 / MIB);
        if self.state_bytes > 0 {
            memory += &format!(" + state {:.1} MiB", self.state_bytes as f64 / MIB);
        }
        if let (Some(pages), Some(share)) = (self.reading.pages(), self.reading.share()) {
            let exposure = self
                .reading
                .exposure()
                .map_or_else(String::new, |e| format!(", effective exposure {e:.2}"));
            lines.push(format!(
                "read {pages:.1} pages per KV head and step ({:.0} % of the valid ones){exposure}; {memory}",
                100.0 * share
            ));
        } else if self.state_bytes > 0 {
            // On a GPU, in hosts' forms, and before the first step.
            lines.push(format!("pages were not counted; {memory}"));
        } else {
            lines.push(format!("read every page; {memory}"));
        }
        if let Some(passes) = self.passes {
            lines.push(format!(
                "rectified {} time{}, {:.0} ms of the decoding time",
                passes.count,
                if passes.count == 1 { "" } else { "s" },
                passes.time.as_secs_f64() * 1e3
            ));
        }
        lines
    }
}

fn rate(tokens: usize, time: Duration) -> Option<f64> {
    (tokens > 0 && !time.is_zero()).then(|| tokens as f64 / time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_tokens_over_time_and_absent_without_either() {
        let s = Stats {
            prompt_tokens: 100,
            prompt_time: Duration::from_millis(500),
            ..Stats::default()
        };
        assert_eq!(s.prompt_rate(), Some(200.0));
        assert_eq!(s.decode_rate(), None);
        assert!(s.lines()[2].contains("every page"));
        assert_eq!(
            serde_json::to_value(s.json()).unwrap()["effective_exposure"],
            serde_json::Value::Null
        );
    }

    /// What has the operator's state reads less than everything, whether it is counted or not.
    #[test]
    fn converted_models_are_not_said_to_read_everything() {
        let s = Stats {
            state_bytes: 1 << 20,
            ..Stats::default()
        };
        assert!(s.lines()[2].starts_with("pages were not counted"), "{:?}", s.lines());
    }
}
