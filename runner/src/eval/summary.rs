//! From results to the rows of a table. Errors are standard errors over documents or texts, which are independent;
//! answers of one output are not.

use serde::{Serialize, de::DeserializeOwned};

use super::{
    documents::DocumentResult,
    journal::Journal,
    perplexity::{Fidelity, PARTS},
    policy::{PolicyKind, PolicyRow},
};
use crate::{decoder::page_reads::PageReads, eval::score::mean_and_error};

/// A mean and its standard error.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// The mean.
    pub mean: f64,
    /// Its standard error; `None` for a single document.
    pub error: Option<f64>,
}

impl Estimate {
    /// The estimate from one number per document; NaN is skipped. `None` without numbers.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let values: Vec<f64> = values.into_iter().filter(|v| v.is_finite()).collect();
        let (mean, error) = mean_and_error(&values);
        (!values.is_empty()).then(|| Self {
            mean,
            error: error.is_finite().then_some(error),
        })
    }

    /// `mean ± error` with `digits` decimals.
    pub fn text(self, digits: usize) -> String {
        let error = self.error.map_or_else(String::new, |e| format!(" ± {e:.digits$}"));
        format!("{:.digits$}{error}", self.mean)
    }
}

/// Cost of a policy: what it read, and its speed.
#[derive(Clone, Debug, Serialize)]
pub struct Cost {
    /// Pages read per KV head and step; `None` for dense attention.
    pub pages_per_step: Option<f64>,
    /// The same as a fraction of the valid pages, 0 to 1.
    pub share_of_valid_pages: Option<f64>,
    /// Keys, values and page summaries that a step of one sequence reads in all layers, in KiB.
    pub kib_per_step: f64,
    /// The same as a fraction of what dense attention reads.
    pub share_of_dense_bytes: Option<f64>,
    /// [`PageReads::exposure`].
    pub effective_exposure: Option<f64>,
    /// Decoding speed, all sequences together.
    pub tokens_per_second: Option<f64>,
    /// Rectifying passes over all sequences; none where there were to be none.
    pub rectify_passes: Option<f64>,
    /// Their share of the decoding time, 0 to 1.
    pub rectify_share_of_time: Option<f64>,
}

/// The result of a document or text.
trait Measured: Clone + Serialize + DeserializeOwned {
    fn reading(&self) -> &PageReads;
    /// Tokens that were decoded in `seconds`.
    fn decoded(&self) -> usize;
    fn seconds(&self) -> f64;
    /// Of `seconds`, those of rectifying passes.
    fn pass_seconds(&self) -> Option<f64>;
    /// Bytes read per step.
    fn bytes(&self) -> f64;
    /// Bytes that dense attention reads per step.
    fn dense_bytes(&self) -> Option<f64>;
}

impl Measured for DocumentResult {
    fn reading(&self) -> &PageReads {
        &self.reading
    }

    fn decoded(&self) -> usize {
        (self.asked + self.generated).saturating_sub(1)
    }

    fn seconds(&self) -> f64 {
        self.seconds
    }

    fn pass_seconds(&self) -> Option<f64> {
        self.pass_seconds
    }

    fn bytes(&self) -> f64 {
        self.bytes
    }

    fn dense_bytes(&self) -> Option<f64> {
        self.dense_bytes
    }
}

impl Measured for Fidelity {
    fn reading(&self) -> &PageReads {
        &self.reading
    }

    fn decoded(&self) -> usize {
        self.count()
    }

    fn seconds(&self) -> f64 {
        self.seconds
    }

    fn pass_seconds(&self) -> Option<f64> {
        self.pass_seconds
    }

    fn bytes(&self) -> f64 {
        self.bytes
    }

    fn dense_bytes(&self) -> Option<f64> {
        self.dense_bytes
    }
}

impl Cost {
    fn new<T: Measured>(row: &PolicyRow, parts: &[&T]) -> Self {
        let mut reading = PageReads::default();
        parts.iter().for_each(|p| reading.add(p.reading()));
        let sum = |of: &dyn Fn(&T) -> f64| parts.iter().map(|p| of(p)).sum::<f64>();
        let bytes = sum(&|p| p.bytes()) / parts.len().max(1) as f64;
        // For the row's own lengths: outputs of two policies differ in length.
        let dense = parts.iter().map(|p| p.dense_bytes()).sum::<Option<f64>>();
        let dense = dense
            .map(|sum| sum / parts.len().max(1) as f64)
            .filter(|&bytes| bytes > 0.0);
        let seconds = sum(&|p| p.seconds());
        let pass_seconds = parts.iter().map(|p| p.pass_seconds()).sum::<Option<f64>>();
        Self {
            pages_per_step: reading.pages(),
            share_of_valid_pages: reading.share(),
            kib_per_step: bytes / 1024.0,
            share_of_dense_bytes: dense.map(|dense| bytes / dense),
            effective_exposure: reading.exposure(),
            tokens_per_second: (seconds > 0.0).then(|| sum(&|p| p.decoded() as f64) / seconds),
            rectify_passes: row.rectify.map(|_| reading.passes()),
            rectify_share_of_time: pass_seconds.filter(|_| seconds > 0.0).map(|passes| passes / seconds),
        }
    }
}

/// Policy, window and budget of a row.
#[derive(Clone, Debug, Serialize)]
pub struct Subject {
    /// The policy's name.
    pub policy: String,
    /// How it reads the cache.
    pub kind: PolicyKind,
    /// The window w; none where it is not set.
    pub window: Option<usize>,
    /// As the command line has it; none for dense attention.
    pub budget: Option<String>,
}

impl Subject {
    fn new(row: &PolicyRow) -> Self {
        Self {
            policy: row.label.clone(),
            kind: row.kind,
            window: row.window,
            budget: row.budget.map(|b| b.to_string()),
        }
    }
}

/// A row for documents.
#[derive(Clone, Debug, Serialize)]
pub struct DocumentsRow {
    /// Which policy.
    #[serde(flatten)]
    pub subject: Subject,
    /// Documents measured.
    pub documents: usize,
    /// Tokens generated over all of them.
    pub generated_tokens: usize,
    /// Right answers, in percent.
    pub right: Estimate,
    /// Paired difference to Quest at the same budget, in percentage points.
    pub difference_to_quest: Option<Estimate>,
    /// Answers before the first wrong one, in percent.
    pub first_wrong: Option<Estimate>,
    /// Right answers per quarter of the output, in percent.
    pub quarters: [Option<Estimate>; 4],
    /// What it read, and how fast it was.
    #[serde(flatten)]
    pub cost: Cost,
}

/// A row for texts.
#[derive(Clone, Debug, Serialize)]
pub struct FidelityRow {
    /// Which policy.
    #[serde(flatten)]
    pub subject: Subject,
    /// Texts measured.
    pub texts: usize,
    /// Tokens predicted over all of them.
    pub tokens: usize,
    /// exp of the mean negative log-likelihood.
    pub perplexity: f64,
    /// Mean KL divergence from dense attention's next-token distribution, in nats per token.
    pub divergence: Estimate,
    /// Paired ratio of the divergence to Quest's at the same budget.
    pub share_of_quest: Option<Estimate>,
    /// Divergence per eighth of the predicted text.
    pub by_position: [Option<f64>; PARTS],
    /// Perplexity per eighth of the predicted text.
    pub perplexity_by_position: [Option<f64>; PARTS],
    /// Fraction of tokens for which dense attention has the same top token.
    pub agreement: f64,
    /// What it read, and how fast it was.
    #[serde(flatten)]
    pub cost: Cost,
}

fn results<'a, T: Measured>(journal: &'a Journal<T>, row: &PolicyRow, count: usize) -> Vec<&'a T> {
    (0..count).filter_map(|i| journal.get(&row.key(), i)).collect()
}

/// Compares a row with Quest at its budget, item by item; `None` for Quest itself, and if there is no such row. Dense
/// attention has no budget: it is compared with Quest where that is measured at one only.
fn against_quest<T: Measured>(
    rows: &[PolicyRow],
    row: &PolicyRow,
    journal: &Journal<T>,
    count: usize,
    compare: impl Fn(&T, &T) -> f64,
) -> Option<Estimate> {
    let mut quests = rows.iter().filter(|r| r.kind == PolicyKind::Quest);
    let quest = if row.kind == PolicyKind::Dense {
        let only = quests.next();
        only.filter(|only| quests.all(|other| other.budget == only.budget))?
    } else {
        quests.find(|r| r.budget == row.budget)?
    };
    if quest.key() == row.key() {
        return None;
    }
    let pair = |i| Some(compare(journal.get(&row.key(), i)?, journal.get(&quest.key(), i)?));
    Estimate::of((0..count).filter_map(pair))
}

/// Rows of documents.
pub fn documents(rows: &[PolicyRow], journal: &Journal<DocumentResult>, count: usize) -> Vec<DocumentsRow> {
    let summarize = |row: &PolicyRow| {
        let own = results(journal, row, count);
        let quarter = |q: usize| {
            let of = |o: &&DocumentResult| 100.0 * o.quarters().get(q).copied().unwrap_or(f64::NAN);
            Estimate::of(own.iter().map(of))
        };
        Some(DocumentsRow {
            subject: Subject::new(row),
            documents: own.len(),
            generated_tokens: own.iter().map(|o| o.generated).sum(),
            right: Estimate::of(own.iter().map(|o| 100.0 * o.share()))?,
            difference_to_quest: against_quest(rows, row, journal, count, |o, q| 100.0 * (o.share() - q.share())),
            first_wrong: Estimate::of(own.iter().map(|o| 100.0 * o.first_wrong())),
            quarters: std::array::from_fn(quarter),
            cost: Cost::new(row, &own),
        })
    };
    rows.iter().filter_map(summarize).collect()
}

/// Rows of texts.
pub fn fidelities(rows: &[PolicyRow], journal: &Journal<Fidelity>, count: usize) -> Vec<FidelityRow> {
    let summarize = |row: &PolicyRow| {
        let own = results(journal, row, count);
        let tokens: usize = own.iter().map(|o| o.count()).sum();
        let sum = |of: &dyn Fn(&Fidelity) -> f64| own.iter().map(|o| of(o)).sum::<f64>();
        let at = |of: fn(&Fidelity) -> &[f64; PARTS], part: usize| {
            let n = sum(&|o| o.tokens.get(part).map_or(0.0, |&n| n as f64));
            let total = sum(&|o| of(o).get(part).copied().unwrap_or(0.0));
            (n > 0.0).then(|| total / n)
        };
        Some(FidelityRow {
            subject: Subject::new(row),
            texts: own.len(),
            tokens,
            perplexity: (sum(&|o| o.mean_surprise() * o.count() as f64) / tokens.max(1) as f64).exp(),
            divergence: Estimate::of(own.iter().map(|o| o.mean_divergence()))?,
            // Dense attention's is 0 of anything.
            share_of_quest: against_quest(rows, row, journal, count, |o, q| {
                o.mean_divergence() / q.mean_divergence()
            })
            .filter(|_| row.kind != PolicyKind::Dense),
            by_position: std::array::from_fn(|part| at(|o| &o.divergence, part)),
            perplexity_by_position: std::array::from_fn(|part| at(|o| &o.surprise, part).map(f64::exp)),
            agreement: sum(&|o| o.agreed as f64) / tokens.max(1) as f64,
            cost: Cost::new(row, &own),
        })
    };
    rows.iter().filter_map(summarize).collect()
}

fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |v| format!("{v:.digits$}"))
}

fn estimate(value: Option<Estimate>, digits: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |v| v.text(digits))
}

fn signed(value: Option<Estimate>) -> String {
    value.map_or_else(
        || "-".to_owned(),
        |v| {
            if v.mean >= 0.0 {
                format!("+{}", v.text(1))
            } else {
                v.text(1)
            }
        },
    )
}

fn read(cost: &Cost) -> [String; 3] {
    [
        cost.pages_per_step.map_or_else(
            || "all".to_owned(),
            |p| format!("{p:.1} ({:.1} %)", 100.0 * cost.share_of_valid_pages.unwrap_or(1.0)),
        ),
        format!("{:.0} KiB", cost.kib_per_step),
        number(cost.effective_exposure, 2),
    ]
}

/// Whether outputs have answers enough to say where in them they are right: four in some document.
pub fn tells_places(rows: &[DocumentsRow]) -> bool {
    rows.iter().any(|row| row.quarters.iter().all(Option::is_some))
}

/// The table of documents: header and lines. Columns about the place in the output are left out where no output has
/// answers enough for them.
pub fn documents_table(rows: &[DocumentsRow]) -> Vec<Vec<String>> {
    let places = tells_places(rows);
    let header = [
        "policy",
        "budget",
        "right answers %",
        "- Quest",
        "first wrong at %",
        "by quarter of the output %",
        "pages a step",
        "read a step",
        "exposure",
        "tokens/s",
    ];
    let mut lines = vec![header.map(str::to_owned).to_vec()];
    for row in rows {
        let quarters: Vec<String> = row.quarters.iter().map(|q| number(q.map(|q| q.mean), 0)).collect();
        let [pages, bytes, exposure] = read(&row.cost);
        lines.push(vec![
            row.subject.policy.clone(),
            row.subject.budget.clone().unwrap_or_else(|| "-".into()),
            row.right.text(1),
            signed(row.difference_to_quest),
            estimate(row.first_wrong, 0),
            quarters.join(" / "),
            pages,
            bytes,
            exposure,
            number(row.cost.tokens_per_second, 0),
        ]);
    }
    if !places {
        lines.iter_mut().for_each(|line| drop(line.drain(4..6)));
    }
    lines
}

/// The table of texts: header and lines.
pub fn fidelity_table(rows: &[FidelityRow]) -> Vec<Vec<String>> {
    let header = [
        "policy",
        "budget",
        "perplexity",
        "KL to dense",
        "/ Quest's",
        "by eighth of the text",
        "same best %",
        "pages a step",
        "read a step",
        "exposure",
        "tokens/s",
    ];
    let mut lines = vec![header.map(str::to_owned).to_vec()];
    for row in rows {
        let parts: Vec<String> = row.by_position.iter().map(|&p| number(p, 2)).collect();
        let [pages, bytes, exposure] = read(&row.cost);
        lines.push(vec![
            row.subject.policy.clone(),
            row.subject.budget.clone().unwrap_or_else(|| "-".into()),
            format!("{:.3}", row.perplexity),
            row.divergence.text(4),
            estimate(row.share_of_quest, 3),
            parts.join(" "),
            format!("{:.1}", 100.0 * row.agreement),
            pages,
            bytes,
            exposure,
            number(row.cost.tokens_per_second, 0),
        ]);
    }
    lines
}

#[cfg(test)]
mod tests {
    use retro_contract::Budget;

    use super::*;
    use crate::eval::policy::ModelSource;

    #[test]
    fn estimates_leave_out_what_is_not_there() {
        assert_eq!(Estimate::of([]), None);
        assert_eq!(Estimate::of([f64::NAN]), None);
        assert_eq!(Estimate::of([2.0]), Some(Estimate { mean: 2.0, error: None }));
        let e = Estimate::of([1.0, f64::NAN, 3.0]).unwrap();
        assert_eq!((e.mean, e.error), (2.0, Some(1.0)));
        assert_eq!(e.text(1), "2.0 ± 1.0");
    }

    /// Differences are over the same documents, so that their errors are smaller than those of either.
    #[test]
    fn differences_to_quest_are_paired() {
        let row = |kind, budget: Option<f64>| PolicyRow {
            kind,
            label: format!("{kind:?}"),
            source: ModelSource::Graph("m".into()),
            window: None,
            budget: budget.map(Budget::Ratio),
            rectify: None,
        };
        let mut journal = Journal::in_memory();
        let mut put = |row: &PolicyRow, right: [[bool; 2]; 3]| {
            for (i, right) in right.into_iter().enumerate() {
                let result = DocumentResult {
                    right: right.to_vec(),
                    reading: PageReads::default(),
                    generated: 1,
                    asked: 0,
                    seconds: 1.0,
                    pass_seconds: None,
                    bytes: 1.0,
                    dense_bytes: None,
                };
                journal.put(&row.key(), i, result).unwrap();
            }
        };
        let (t, f) = (true, false);
        let mut rows = vec![
            row(PolicyKind::Dense, None),
            row(PolicyKind::Quest, Some(0.1)),
            row(PolicyKind::Retro, Some(0.1)),
        ];
        put(&rows[0], [[t, t], [t, t], [t, t]]);
        put(&rows[1], [[f, f], [t, f], [t, t]]);
        put(&rows[2], [[t, f], [t, t], [t, t]]);
        let other = row(PolicyKind::Quest, Some(0.2));
        put(&other, [[t, t], [t, t], [t, t]]);
        let differences = |rows: &[PolicyRow]| -> Vec<Option<Estimate>> {
            let all = documents(rows, &journal, 3);
            all.iter().map(|r| r.difference_to_quest).collect()
        };
        let found = differences(&rows);
        let error = |e: Option<Estimate>| (e.unwrap().mean.round(), e.unwrap().error.unwrap());
        assert_eq!(error(found[0]).0, 50.0);
        assert!(found[1].is_none());
        // 50, 50 and 0 points: not the errors of both, which are 29 and 17.
        let (mean, of_pairs) = error(found[2]);
        assert_eq!(mean, 33.0);
        assert!((of_pairs - 50.0 / 3.0).abs() < 1e-9, "{of_pairs}");
        // Dense attention has no budget to be compared at where there are two.
        rows.push(other);
        assert!(differences(&rows)[0].is_none());
    }
}
