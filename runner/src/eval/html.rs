//! The HTML report: a self-contained page with the table and SVG figures.

use std::fmt::Write as _;

use super::{
    Result,
    figure::{Series, Texts, figure},
    perplexity::PARTS,
    policy::PolicyKind,
    summary::{Cost, DocumentsRow, Estimate, FidelityRow, Subject, tells_places},
};

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// A budget as a number for the x axis.
fn number(budget: Option<&str>) -> Option<f64> {
    budget?.parse().ok()
}

/// One line per policy, over its budgets.
fn over_budgets<T>(rows: &[T], of: impl Fn(&T) -> (&Subject, Estimate)) -> Vec<Series> {
    let budgets: Vec<f64> = rows.iter().filter_map(|r| number(of(r).0.budget.as_deref())).collect();
    let mut lines: Vec<Series> = Vec::new();
    for row in rows {
        let (subject, value) = of(row);
        let point = |b| (b, value.mean, value.error.unwrap_or(0.0));
        // A policy without a budget is a horizontal line.
        let points: Vec<_> = number(subject.budget.as_deref())
            .map_or_else(|| budgets.iter().copied().map(point).collect(), |b| vec![point(b)]);
        push(&mut lines, &subject.policy, points);
    }
    for line in &mut lines {
        line.points.sort_by(|a, b| a.0.total_cmp(&b.0));
        line.points.dedup_by(|a, b| a.0 == b.0);
    }
    lines
}

/// Exposure over windows, a line per selection and budget; `None` if each has one window.
fn exposures<'a>(rows: impl Iterator<Item = (&'a Subject, &'a Cost)>) -> Result<Option<(String, String)>> {
    let mut lines: Vec<Series> = Vec::new();
    for (subject, cost) in rows {
        let (Some(budget), Some(window), Some(exposure)) = (&subject.budget, subject.window, cost.effective_exposure)
        else {
            continue;
        };
        if !matches!(subject.kind, PolicyKind::Retro | PolicyKind::Quest) {
            continue;
        }
        // The name without the window; Quest is Retro with w = 1.
        let name = subject
            .policy
            .replace(&format!(" (w = {window})"), "")
            .replace("Quest", "Retro");
        push(
            &mut lines,
            &format!("{name}, budget {budget}"),
            [(window as f64, exposure, 0.0)],
        );
    }
    lines
        .iter_mut()
        .for_each(|l| l.points.sort_by(|a, b| a.0.total_cmp(&b.0)));
    lines.retain(|l| l.points.len() > 1);
    let texts = Texts {
        title: "Effective exposure by window",
        x: "window w",
        y: "effective exposure",
    };
    let draw = || figure(&texts, &lines);
    let drawn = (!lines.is_empty()).then(draw).transpose()?;
    Ok(drawn.map(|svg| ("exposure-window".to_owned(), svg)))
}

/// Adds points to the line of a name.
fn push(lines: &mut Vec<Series>, name: &str, points: impl IntoIterator<Item = (f64, f64, f64)>) {
    match lines.iter_mut().find(|l| l.name == name) {
        Some(line) => line.points.extend(points),
        None => lines.push(Series {
            name: name.to_owned(),
            points: points.into_iter().collect(),
        }),
    }
}

/// The budgets of the rows.
fn budgets<T>(rows: &[T], subject: impl Fn(&T) -> &Subject) -> Vec<&str> {
    let mut budgets: Vec<&str> = Vec::new();
    for budget in rows.iter().filter_map(|r| subject(r).budget.as_deref()) {
        if !budgets.contains(&budget) {
            budgets.push(budget);
        }
    }
    budgets
}

/// A title: what is shown, and over what.
fn over(what: &str, budgets: &[&str]) -> String {
    match budgets {
        [] => what.to_owned(),
        [budget] => format!("{what}, budget {budget}"),
        _ => format!("{what} by budget"),
    }
}

/// One line per policy over the parts of an output, a figure per budget.
fn by_place<T>(
    rows: &[T],
    (file, title, x, y): (&str, &str, &str, &str),
    subject: impl Fn(&T) -> &Subject,
    points: impl Fn(&T) -> Vec<Option<(f64, f64)>>,
) -> Result<Vec<(String, String)>> {
    let mut figures = Vec::new();
    for budget in budgets(rows, &subject) {
        let of_budget = rows
            .iter()
            .filter(|r| subject(r).budget.as_deref().is_none_or(|b| b == budget));
        let lines: Vec<Series> = of_budget
            .map(|r| Series {
                name: subject(r).policy.clone(),
                points: (points(r).into_iter().zip(1..))
                    .filter_map(|(p, i)| p.map(|(value, error)| (f64::from(i), value, error)))
                    .collect(),
            })
            .collect();
        let title = &format!("{title}, budget {budget}");
        let svg = figure(&Texts { title, x, y }, &lines)?;
        figures.push((format!("{file}-{budget}"), svg));
    }
    Ok(figures)
}

/// The figures for documents: file names and SVG.
///
/// # Errors
/// When drawing fails.
pub fn documents_figures(rows: &[DocumentsRow]) -> Result<Vec<(String, String)>> {
    let mut figures = Vec::new();
    let lines = over_budgets(rows, |r| (&r.subject, r.right));
    if lines.iter().any(|l| !l.points.is_empty()) {
        let texts = Texts {
            title: &over("Right answers", &budgets(rows, |r| &r.subject)),
            x: "budget",
            y: "right answers, %",
        };
        let svg = figure(&texts, &lines)?;
        figures.push(("accuracy-budget".to_owned(), svg));
    }
    let texts = (
        "accuracy-position",
        "Right answers by place in the output",
        "quarter of the output",
        "right answers, %",
    );
    let value = |e: Estimate| (e.mean, e.error.unwrap_or(0.0));
    let quarters = |r: &DocumentsRow| r.quarters.iter().map(|q| q.map(value)).collect();
    if tells_places(rows) {
        figures.extend(by_place(rows, texts, |r| &r.subject, quarters)?);
    }
    figures.extend(exposures(rows.iter().map(|r| (&r.subject, &r.cost)))?);
    Ok(figures)
}

/// The figures for texts: file names and SVG.
///
/// # Errors
/// When drawing fails.
pub fn fidelity_figures(rows: &[FidelityRow]) -> Result<Vec<(String, String)>> {
    let sparse: Vec<FidelityRow> = rows
        .iter()
        .filter(|r| r.subject.kind != PolicyKind::Dense)
        .cloned()
        .collect();
    let mut figures = Vec::new();
    let kl = "KL, nats a token";
    let lines = over_budgets(&sparse, |r| (&r.subject, r.divergence));
    if lines.iter().any(|l| !l.points.is_empty()) {
        let texts = Texts {
            title: &over("Divergence from dense attention", &budgets(&sparse, |r| &r.subject)),
            x: "budget",
            y: kl,
        };
        let svg = figure(&texts, &lines)?;
        figures.push(("divergence-budget".to_owned(), svg));
    }
    let x = format!("part of the text behind the prompt, of {PARTS}");
    let exact = |values: &[Option<f64>; PARTS]| values.iter().map(|v| v.map(|v| (v, 0.0))).collect();
    let texts = ("divergence-position", "Divergence by place in the text", x.as_str(), kl);
    figures.extend(by_place(&sparse, texts, |r| &r.subject, |r| exact(&r.by_position))?);
    let texts = (
        "perplexity-position",
        "Perplexity by place in the text",
        x.as_str(),
        "perplexity",
    );
    figures.extend(by_place(
        rows,
        texts,
        |r| &r.subject,
        |r| exact(&r.perplexity_by_position),
    )?);
    figures.extend(exposures(sparse.iter().map(|r| (&r.subject, &r.cost)))?);
    Ok(figures)
}

/// The whole page.
pub fn page(title: &str, facts: &[String], table: &[Vec<String>], figures: &[(String, String)]) -> String {
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{0}</title>\n<style>\n\
         body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #222 }}\n\
         table {{ border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }}\n\
         th, td {{ padding: 3px 9px; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }}\n\
         th:first-child, td:first-child {{ text-align: left }}\n\
         th:first-child, td:first-child {{ position: sticky; left: 0; background: #fff }}\n\
         p {{ overflow-wrap: anywhere }}\n\
         .wide {{ overflow-x: auto }}\n\
         svg {{ display: block; width: 100%; max-width: 680px; height: auto; margin: 2em 0 }}\n\
         @media (max-width: 600px) {{ body {{ margin: 1em auto }} }}\n\
         </style>\n<h1>{0}</h1>\n",
        escape(title)
    );
    for fact in facts {
        let _ = writeln!(out, "<p>{}</p>", escape(fact));
    }
    out += "<div class=\"wide\"><table>\n";
    for (i, line) in table.iter().enumerate() {
        let tag = if i == 0 { "th" } else { "td" };
        let cells: String = line.iter().map(|c| format!("<{tag}>{}</{tag}>", escape(c))).collect();
        let _ = writeln!(out, "<tr>{cells}</tr>");
    }
    out += "</table></div>\n";
    for (_, svg) in figures {
        out += svg.trim_start_matches(|c| c != '<');
        out += "\n";
    }
    out += "</html>\n";
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_without_budget_is_a_level_line() {
        let rows = [("dense", None, 100.0), ("a", Some("0.2"), 2.0), ("a", Some("0.1"), 1.0)];
        let rows = rows.map(|(policy, budget, mean)| {
            let subject = Subject {
                policy: policy.to_owned(),
                kind: PolicyKind::Retro,
                window: None,
                budget: budget.map(str::to_owned),
            };
            (subject, Estimate { mean, error: None })
        });
        let lines = over_budgets(&rows, |(subject, value)| (subject, *value));
        assert_eq!(lines[0].points, [(0.1, 100.0, 0.0), (0.2, 100.0, 0.0)]);
        assert_eq!(lines[1].points, [(0.1, 1.0, 0.0), (0.2, 2.0, 0.0)]);
    }

    #[test]
    fn pages_are_whole_and_escaped() {
        let text = page("a < b", &["x & y".into()], &[vec!["p".into()], vec!["<q>".into()]], &[]);
        assert!(
            text.contains("<h1>a &lt; b</h1>") && text.contains("<td>&lt;q&gt;</td>") && text.ends_with("</html>\n")
        );
    }
}
