//! The HTML report: a self-contained page with the table and SVG figures.

use std::fmt::Write as _;

use plotters::prelude::*;

use super::{
    Error, Result,
    perplexity::PARTS,
    policy::PolicyKind,
    summary::{Cost, DocumentsRow, Estimate, FidelityRow, Subject},
};

/// A line of a figure.
pub struct Series {
    /// Name in the legend.
    pub name: String,
    /// x, y and the standard error of y.
    pub points: Vec<(f64, f64, f64)>,
}

/// The colour-blind safe palette of Okabe and Ito.
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 0, 0),
    RGBColor(213, 94, 0),
    RGBColor(0, 114, 178),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(120, 120, 120),
];

const SIZE: (u32, u32) = (760, 420);

/// Draws lines with error bars of one standard error.
///
/// # Errors
/// When there is nothing to draw or the drawing fails.
pub fn figure(title: &str, x: &str, y: &str, lines: &[Series]) -> Result<String> {
    let finite = |(x, y, e): &(f64, f64, f64)| x.is_finite() && y.is_finite() && e.is_finite();
    let points: Vec<(f64, f64, f64)> = lines
        .iter()
        .flat_map(|l| l.points.iter().copied())
        .filter(finite)
        .collect();
    let range = |of: &dyn Fn(&(f64, f64, f64)) -> f64| {
        let low = points.iter().map(of).fold(f64::INFINITY, f64::min);
        let high = points.iter().map(of).fold(f64::NEG_INFINITY, f64::max);
        (low, high)
    };
    if points.is_empty() {
        return Err(Error::NoData(title.to_owned()));
    }
    let (x_low, x_high) = range(&|p| p.0);
    let (_, y_high) = range(&|p| p.1 + p.2);
    let margin = ((x_high - x_low) * 0.05).max(1e-6);
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let fail = |e: &dyn std::fmt::Display| Error::Draw {
            title: title.to_owned(),
            reason: e.to_string(),
        };
        area.fill(&WHITE).map_err(|e| fail(&e))?;
        let mut chart = ChartBuilder::on(&area)
            .caption(title, ("sans-serif", 18))
            .margin(12)
            .margin_right(24)
            .x_label_area_size(40)
            .y_label_area_size(56)
            .build_cartesian_2d(x_low - margin..x_high + margin, 0.0..(y_high * 1.05).max(1e-9))
            .map_err(|e| fail(&e))?;
        chart
            .configure_mesh()
            .x_desc(x)
            .y_desc(y)
            .light_line_style(WHITE)
            .x_label_formatter(&|v| short(*v))
            .y_label_formatter(&|v| short(*v))
            .draw()
            .map_err(|e| fail(&e))?;
        for (line, colour) in lines.iter().zip(COLOURS.iter().cycle()) {
            let points: Vec<_> = line.points.iter().copied().filter(finite).collect();
            let path = points.iter().map(|&(x, y, _)| (x, y));
            chart
                .draw_series(LineSeries::new(path.clone(), colour.stroke_width(2)))
                .map_err(|e| fail(&e))?
                .label(line.name.clone())
                .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 18, y)], colour.stroke_width(2)));
            chart
                .draw_series(path.map(|p| Circle::new(p, 3, colour.filled())))
                .map_err(|e| fail(&e))?;
            let bars = points.iter().filter(|p| p.2 > 0.0);
            chart
                .draw_series(
                    bars.map(|&(x, y, e)| PathElement::new(vec![(x, y - e), (x, y + e)], colour.stroke_width(1))),
                )
                .map_err(|e| fail(&e))?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.85))
            .border_style(RGBColor(200, 200, 200))
            .label_font(("sans-serif", 12))
            .draw()
            .map_err(|e| fail(&e))?;
        area.present().map_err(|e| fail(&e))?;
    }
    Ok(svg)
}

/// A tick label without trailing zeros.
fn short(v: f64) -> String {
    let text = format!("{v:.3}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".to_owned() } else { text.to_owned() }
}

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
    let draw = || figure("Effective exposure by window", "window w", "effective exposure", &lines);
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

/// One line per policy over the parts of an output, a figure per budget.
fn by_place<T>(
    rows: &[T],
    (file, title, x, y): (&str, &str, &str, &str),
    subject: impl Fn(&T) -> &Subject,
    points: impl Fn(&T) -> Vec<Option<(f64, f64)>>,
) -> Result<Vec<(String, String)>> {
    let mut budgets: Vec<&str> = Vec::new();
    for budget in rows.iter().filter_map(|r| subject(r).budget.as_deref()) {
        if !budgets.contains(&budget) {
            budgets.push(budget);
        }
    }
    let mut figures = Vec::new();
    for budget in budgets {
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
        let svg = figure(&format!("{title}, budget {budget}"), x, y, &lines)?;
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
        let svg = figure("Right answers by budget", "budget", "right answers, %", &lines)?;
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
    figures.extend(by_place(rows, texts, |r| &r.subject, quarters)?);
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
        let svg = figure("Divergence from dense attention by budget", "budget", kl, &lines)?;
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
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<title>{0}</title>\n<style>\n\
         body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #222 }}\n\
         table {{ border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }}\n\
         th, td {{ padding: 3px 9px; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }}\n\
         th:first-child, td:first-child {{ text-align: left }}\n\
         .wide {{ overflow-x: auto }}\n\
         svg {{ max-width: 100%; height: auto; margin: 1em 0 }}\n\
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
    fn figures_hold_their_lines_and_refuse_nothing() {
        let line = Series {
            name: "Retro <w>".into(),
            points: vec![(0.1, 20.0, 1.0), (0.2, 40.0, f64::NAN), (0.3, 60.0, 0.0)],
        };
        let svg = figure("t", "x", "y", &[line]).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("Retro &lt;w&gt;"), "{svg}");
        // One point without a finite error is left out.
        assert_eq!(svg.matches("<circle").count(), 2);
        assert!(figure("t", "x", "y", &[]).is_err());
    }

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
        assert_eq!(short(0.10), "0.1");
        assert_eq!(short(100.0), "100");
        assert_eq!(short(-0.0), "0");
    }
}
