//! Policies of the command line, and the rows of the comparison made from them.

use std::{path::PathBuf, str::FromStr};

use retro_contract::{Budget, Mode, pages_for};
use retro_export::Settings;

use super::Error;
use crate::{Model, decoder::decode_loop::Policy};

/// How a policy reads the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PolicyKind {
    /// Dense attention: the unconverted model.
    Dense,
    /// StreamingLLM: sink pages and the newest ones.
    Streaming,
    /// pi-Attention's pattern: sink pages, the newest ones and every pi-th between.
    Periodic,
    /// Quest: the paper's selection without correction, the baseline.
    Quest,
    /// Selection with retrospective correction.
    Retro,
    /// A given model as it is.
    Folder,
}

/// A policy as the command line has it: `NAME[,option=value]...`.
#[derive(Clone, Debug, PartialEq)]
pub struct PolicySpec {
    kind: PolicyKind,
    name: &'static str,
    /// For retro policies; `None`: all windows of the command line.
    window: Option<usize>,
    rectify: Option<usize>,
    settings: Settings,
}

const NAMES: &str = "dense, streaming, periodic, quest, retro or recommended";
const OPTIONS: &str = "window, rectify, selector, group-score, lambda, correlation, sketch-bits, page-size, \
                       min-pages, sink-pages or dense-layers";

/// Tokens that a step reads at least under every policy, unless its option min-pages says otherwise: fewer than
/// `retro-export`'s floor, so that short contexts too are read as the budgets say that are compared.
const MIN_TOKENS: usize = 64;

fn least_pages(page_size: usize) -> usize {
    pages_for(MIN_TOKENS, page_size.max(1))
}

impl FromStr for PolicySpec {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let (name, options) = s.split_once(',').unwrap_or((s, ""));
        let no_floor = |settings| Settings {
            min_pages: None,
            ..settings
        };
        let (paper, recommended) = (no_floor(Settings::paper()), no_floor(Settings::default()));
        let (kind, name, settings) = match name {
            "dense" => (PolicyKind::Dense, "dense", paper),
            "streaming" => {
                let mode = Mode::Streaming;
                (PolicyKind::Streaming, "StreamingLLM", Settings { mode, ..paper })
            }
            "periodic" => {
                let mode = Mode::Periodic;
                (PolicyKind::Periodic, "periodic", Settings { mode, ..paper })
            }
            "quest" => (PolicyKind::Quest, "Quest", paper),
            "retro" => (PolicyKind::Retro, "Retro", paper),
            "recommended" => (PolicyKind::Retro, "recommended", recommended),
            other => return Err(format!("policy {other:?}: expected {NAMES}")),
        };
        let mut spec = Self {
            kind,
            name,
            window: None,
            rectify: None,
            settings,
        };
        for option in options.split(',').filter(|o| !o.is_empty()) {
            spec.set(option)?;
        }
        let floor = least_pages(spec.settings.page_size);
        spec.settings.min_pages.get_or_insert(floor);
        if spec.kind == PolicyKind::Dense && !options.is_empty() {
            return Err("policy dense has no options: it is the model as its exporter made it".into());
        }
        let mut check = spec.settings.clone();
        check.window = spec.window.unwrap_or(1);
        check.check().map_err(|e| e.to_string())?;
        Ok(spec)
    }
}

impl PolicySpec {
    fn set(&mut self, option: &str) -> Result<(), String> {
        fn number<T: FromStr>(key: &str, value: &str) -> Result<T, String> {
            value.parse().map_err(|_| format!("{key} {value:?} is no number"))
        }
        let (key, value) = option
            .split_once('=')
            .ok_or_else(|| format!("{option:?}: expected NAME[,option=value]... with an option of {OPTIONS}"))?;
        let s = &mut self.settings;
        match key {
            "window" | "w" if self.kind == PolicyKind::Retro => self.window = Some(number(key, value)?),
            "rectify" => {
                let tokens = number(key, value)?;
                if tokens == 0 {
                    return Err("rectify=0: a rectifying pass rewrites at least one token".into());
                }
                self.rectify = Some(tokens);
            }
            "selector" => s.selector = value.parse().map_err(|e| format!("{e}"))?,
            "group-score" => s.group_score = value.parse().map_err(|e| format!("{e}"))?,
            "lambda" => s.selector_lambda = number(key, value)?,
            "correlation" => s.selector_correlation = number(key, value)?,
            "sketch-bits" => s.sketch_bits = number(key, value)?,
            "page-size" => s.page_size = number(key, value)?,
            "min-pages" => s.min_pages = Some(number(key, value)?),
            "sink-pages" => s.sink_pages = number(key, value)?,
            "dense-layers" => {
                let layers = value.split('+').map(|n| number(key, n));
                s.dense_layers = layers.collect::<Result<_, _>>()?;
            }
            _ => return Err(format!("option {key:?} of policy {}: expected {OPTIONS}", self.name)),
        }
        Ok(())
    }

    /// Settings that differ from the defaults, for the label.
    fn changes(&self) -> String {
        let usual = match self.name {
            "recommended" => Settings::default(),
            _ => Settings::paper(),
        };
        let (s, u) = (&self.settings, &usual);
        let mut out = Vec::new();
        out.extend(self.rectify.map(|n| format!("rectify {n}")));
        if (s.selector, s.group_score) != (u.selector, u.group_score) {
            out.push(format!("{} + {}", s.selector, s.group_score));
        }
        if s.selector_lambda != u.selector_lambda {
            out.push(format!("lambda {}", s.selector_lambda));
        }
        if s.selector_correlation != u.selector_correlation {
            out.push(format!("correlation {}", s.selector_correlation));
        }
        if s.sketch_bits != u.sketch_bits {
            out.push(format!(
                "sketches of {} bit{}",
                s.sketch_bits,
                if s.sketch_bits == 1 { "" } else { "s" }
            ));
        }
        if s.page_size != u.page_size {
            out.push(format!("pages of {}", s.page_size));
        }
        if s.least_pages() != least_pages(s.page_size) {
            out.push(format!("at least {} pages", s.least_pages()));
        }
        if s.sink_pages != u.sink_pages {
            out.push(format!("sinks {}", s.sink_pages));
        }
        if s.dense_layers != u.dense_layers {
            let layers: Vec<String> = s.dense_layers.iter().map(usize::to_string).collect();
            out.push(format!("dense layers {}", layers.join("+")));
        }
        out.iter().map(|c| format!(", {c}")).collect()
    }
}

/// Which model a row runs.
#[derive(Clone, Debug, PartialEq)]
pub enum ModelSource {
    /// A graph as it is.
    Graph(PathBuf),
    /// The source model converted with these settings; their window is the largest of the rows that share them.
    Converted(Box<Settings>),
}

/// One policy at one budget and window.
#[derive(Clone, Debug, PartialEq)]
pub struct PolicyRow {
    /// How it reads the cache.
    pub kind: PolicyKind,
    /// Its name in tables and figures.
    pub label: String,
    /// Which model it runs.
    pub source: ModelSource,
    /// `None`: as converted.
    pub window: Option<usize>,
    /// `None`: as converted, or dense.
    pub budget: Option<Budget>,
    /// Tokens between two rectifying passes; `None`: there are none.
    pub rectify: Option<usize>,
}

impl PolicyRow {
    /// The policy for its model.
    ///
    /// # Errors
    /// When the model was not converted for this window or budget, or cannot be rectified so.
    pub fn policy(&self, model: &Model) -> Result<Policy, Error> {
        Policy::new(model, self.window, self.budget)
            .and_then(|policy| policy.rectified(model, self.rectify))
            .map_err(|source| Error::Policy {
                name: self.label.clone(),
                source,
            })
    }

    /// Whether a step reads page summaries.
    pub fn scores(&self) -> bool {
        !matches!(
            self.kind,
            PolicyKind::Dense | PolicyKind::Streaming | PolicyKind::Periodic
        )
    }

    /// Names the row in a file of results: everything that its figures depend on beside the model and the documents.
    pub fn key(&self) -> String {
        let settings = match &self.source {
            ModelSource::Graph(path) => format!("graph {}", path.display()),
            ModelSource::Converted(s) => {
                let mut s = (**s).clone();
                // The window that the model has room for changes nothing.
                s.window = 1;
                format!("{s:?}")
            }
        };
        let budget = self.budget.map_or_else(String::new, |b| b.to_string());
        // Files of results from before there were passes have none in their keys.
        let rectify = self.rectify.map_or_else(String::new, |n| format!(" rectify={n}"));
        format!("{:?} w={:?} b={budget}{rectify} {settings}", self.kind, self.window)
    }
}

/// The rows that `specs` stand for, those of one model together.
pub fn rows(specs: &[PolicySpec], graph: &std::path::Path, windows: &[usize], budgets: &[Budget]) -> Vec<PolicyRow> {
    let mut rows: Vec<PolicyRow> = Vec::new();
    for spec in specs {
        if spec.kind == PolicyKind::Dense {
            rows.push(PolicyRow {
                kind: PolicyKind::Dense,
                label: spec.name.into(),
                source: ModelSource::Graph(graph.to_owned()),
                window: None,
                budget: None,
                rectify: None,
            });
            continue;
        }
        let wanted = match (spec.kind, spec.window) {
            (PolicyKind::Retro, Some(w)) => vec![w],
            (PolicyKind::Retro, None) => windows.to_vec(),
            _ => vec![1],
        };
        for &budget in budgets {
            for &window in &wanted {
                let label = match spec.kind {
                    PolicyKind::Streaming | PolicyKind::Periodic => format!("{}{}", spec.name, spec.changes()),
                    _ => format!("{} (w = {window}){}", spec.name, spec.changes()),
                };
                rows.push(PolicyRow {
                    kind: spec.kind,
                    label,
                    source: ModelSource::Converted(Box::new(Settings {
                        window,
                        ..spec.settings.clone()
                    })),
                    window: Some(window),
                    budget: Some(budget),
                    rectify: spec.rectify,
                });
            }
        }
    }
    share_models(&mut rows);
    let mut unique: Vec<PolicyRow> = Vec::new();
    for row in rows {
        if !unique.iter().any(|u| u.key() == row.key()) {
            unique.push(row);
        }
    }
    unique
}

/// Gives rows that differ in window alone one model, with room for the largest of their windows.
fn share_models(rows: &mut [PolicyRow]) {
    let alike = |a: &Settings, b: &Settings| {
        let window = a.window;
        Settings { window, ..b.clone() } == *a
    };
    let all: Vec<Settings> = rows
        .iter()
        .filter_map(|r| match &r.source {
            ModelSource::Converted(s) => Some((**s).clone()),
            ModelSource::Graph(_) => None,
        })
        .collect();
    for row in rows {
        if let ModelSource::Converted(s) = &mut row.source {
            let largest = all.iter().filter(|other| alike(s, other)).map(|o| o.window).max();
            s.window = largest.unwrap_or(s.window);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn spec(s: &str) -> PolicySpec {
        s.parse().unwrap()
    }

    #[test]
    fn policies_become_rows_that_share_models() {
        let specs = [
            "dense",
            "streaming",
            "quest",
            "retro",
            "retro,w=3,page-size=8",
            "periodic",
        ]
        .map(spec);
        let budgets = [Budget::Ratio(0.1), Budget::Tokens(256)];
        let rows = rows(&specs, Path::new("m"), &[2, 8], &budgets);
        let labels: Vec<&str> = rows.iter().map(|r| r.label.as_str()).collect();
        assert_eq!(rows.len(), 1 + 2 * (1 + 1 + 2 + 1 + 1));
        assert_eq!(labels[0], "dense");
        assert_eq!(labels[3], "Quest (w = 1)");
        assert_eq!(labels[9], "Retro (w = 3), pages of 8");
        // Quest and Retro are one model with room for w = 8.
        assert_eq!(rows[3].source, rows[5].source);
        assert!(matches!(&rows[3].source, ModelSource::Converted(s) if s.window == 8));
        assert_ne!(rows[1].source, rows[3].source);
        // As StreamingLLM it has neither a window nor page summaries to read.
        let periodic = &rows[11];
        assert_eq!((periodic.label.as_str(), periodic.scores()), ("periodic", false));
        assert!(matches!(&periodic.source, ModelSource::Converted(s) if s.mode == Mode::Periodic));
        assert_ne!(rows[3].key(), rows[4].key());
    }

    /// Budgets of short contexts would be the floor otherwise, and pages of another size another floor.
    #[test]
    fn every_policy_has_the_same_floor_in_tokens() {
        for (text, pages, label) in [
            ("quest", 4, ""),
            ("recommended", 8, ""),
            ("recommended,page-size=1", 64, ", pages of 1"),
            ("retro,page-size=64", 1, ", pages of 64"),
            ("retro,min-pages=32", 32, ", at least 32 pages"),
        ] {
            let spec = spec(text);
            assert_eq!(spec.settings.least_pages(), pages, "{text}");
            assert_eq!(spec.changes(), label, "{text}");
        }
    }

    #[test]
    fn the_same_policy_asked_for_twice_is_one_row() {
        let specs = ["quest", "quest", "retro,w=2", "retro"].map(spec);
        let rows = rows(&specs, Path::new("m"), &[2], &[Budget::Ratio(0.1)]);
        assert_eq!(rows.len(), 2);
    }

    /// A pass is the decoding loop's affair: one model serves with and without.
    #[test]
    fn rectifying_passes_are_rows_of_the_same_model() {
        let specs = ["recommended", "recommended,rectify=32", "streaming,rectify=8"].map(spec);
        let rows = rows(&specs, Path::new("m"), &[2], &[Budget::Ratio(0.1)]);
        assert_eq!(rows[1].label, "recommended (w = 2), rectify 32");
        assert_eq!(rows[1].source, rows[0].source);
        assert_ne!(rows[1].key(), rows[0].key());
        assert!(!rows[0].key().contains("rectify"));
        assert_eq!((rows[0].rectify, rows[2].rectify), (None, Some(8)));
    }

    #[test]
    fn what_is_wrong_with_a_policy_is_said() {
        let error = |s: &str| s.parse::<PolicySpec>().unwrap_err();
        assert!(error("nonsense").contains("expected dense"));
        assert!(error("retro,w").contains("option=value"));
        assert!(error("retro,colour=red").contains("colour"));
        assert!(error("retro,window=65").contains("window is 65"));
        assert!(error("quest,window=2").contains("window"));
        assert!(error("dense,page-size=8").contains("no options"));
        assert!(error("dense,rectify=8").contains("no options"));
        assert!(error("quest,rectify=0").contains("at least one token"));
        assert!(error("retro,selector=x").contains("bounds"));
    }
}
