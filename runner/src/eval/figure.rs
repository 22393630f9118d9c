//! Figures as SVG: lines with their names at their ends, or bars. They are as wide as a phone shows them readably.

use plotters::{
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

use super::{Error, Result};

/// A line of a figure.
pub struct Series {
    /// Its name.
    pub name: String,
    /// x, y and the standard error of y.
    pub points: Vec<(f64, f64, f64)>,
}

/// Title and axes of a figure.
pub struct Texts<'a> {
    /// What it shows.
    pub title: &'a str,
    /// What the x axis is.
    pub x: &'a str,
    /// What the y axis is.
    pub y: &'a str,
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
const GRID: RGBColor = RGBColor(225, 225, 225);
const TEXT: RGBColor = RGBColor(40, 40, 40);

const WIDTH: i32 = 540;
const FONT: i32 = 15;
const TITLE: i32 = 17;
/// Height of a line of text.
const LINE: i32 = 18;
/// Space above the plot, for the title and the name of the y axis.
const TOP: i32 = 70;
/// Space below it, for the ticks' labels and the name of the x axis.
const BOTTOM: i32 = 52;
const LEFT: i32 = 56;
const LEAST_HEIGHT: i32 = 240;
/// Longest line of a name, in letters.
const NAME: usize = 20;

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Drawing<T = ()> = std::result::Result<T, DrawingAreaErrorKind<std::io::Error>>;

/// Draws lines with error bars of one standard error; bars where all points have one x.
///
/// # Errors
/// When there is nothing to draw or the drawing fails.
pub fn figure(texts: &Texts<'_>, lines: &[Series]) -> Result<String> {
    let finite = |(x, y, e): &(f64, f64, f64)| x.is_finite() && y.is_finite() && e.is_finite();
    let lines: Vec<Series> = lines
        .iter()
        .map(|l| Series {
            name: l.name.clone(),
            points: l.points.iter().copied().filter(finite).collect(),
        })
        .filter(|l| !l.points.is_empty())
        .collect();
    if lines.is_empty() {
        return Err(Error::NoData(texts.title.to_owned()));
    }
    let mut places: Vec<f64> = lines.iter().flat_map(|l| l.points.iter().map(|p| p.0)).collect();
    places.sort_by(f64::total_cmp);
    places.dedup();
    let drawn = if places.len() == 1 {
        bars(texts, &lines)
    } else {
        plot(texts, &lines, &places)
    };
    drawn.map_err(|e| Error::Draw {
        title: texts.title.to_owned(),
        reason: e.to_string(),
    })
}

/// Draws on a white area of a height.
fn draw(height: i32, title: &str, draw: impl FnOnce(&Area<'_>) -> Drawing) -> Drawing<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH as u32, height as u32)).into_drawing_area();
        area.fill(&WHITE)?;
        write(&area, title, (10, 12), TITLE, HPos::Left)?;
        draw(&area)?;
        area.present()?;
    }
    Ok(svg)
}

/// Writes a line whose top is at a place.
fn write(area: &Area<'_>, text: &str, at: (i32, i32), size: i32, anchor: HPos) -> Drawing {
    // Plotters takes the height of a font's box, and writes 1 / 1.24 of it as the SVG's size.
    let size = f64::from(size) * 1.24;
    let style = ("sans-serif", size)
        .into_font()
        .color(&TEXT)
        .pos(Pos::new(anchor, VPos::Top));
    area.draw(&Text::new(text.to_owned(), at, style))
}

fn line(area: &Area<'_>, from: (i32, i32), to: (i32, i32), colour: RGBColor, width: u32) -> Drawing {
    area.draw(&PathElement::new(vec![from, to], colour.stroke_width(width)))
}

fn colours(lines: &[Series]) -> impl Iterator<Item = (&Series, RGBColor)> {
    lines.iter().zip(COLOURS.iter().copied().cycle())
}

/// A bar for each line's one point, its name above it and its value at its end.
fn bars(texts: &Texts<'_>, lines: &[Series]) -> Drawing<String> {
    const ROW: i32 = 2 * LINE + 12;
    let points = || colours(lines).filter_map(|(l, colour)| Some((l, colour, *l.points.first()?)));
    let high = points().map(|(_, _, p)| p.1 + p.2).fold(0.0, f64::max).max(1e-9);
    let digits = digits(high) + 1;
    let value = |(_, y, e): (f64, f64, f64)| {
        let error = if e > 0.0 {
            format!(" ± {e:.digits$}")
        } else {
            String::new()
        };
        format!("{y:.digits$}{error}")
    };
    let widest = points().map(|(_, _, p)| width(&value(p))).max().unwrap_or(0);
    let most = WIDTH - 30 - widest;
    let length = |v: f64| ((v.max(0.0) / high) * f64::from(most)).round() as i32;
    let height = TOP + ROW * lines.len() as i32 + 12;
    draw(height, texts.title, |area| {
        write(area, texts.y, (10, 38), FONT, HPos::Left)?;
        for ((line_of, colour, point), row) in points().zip(0..) {
            let (top, (_, y, error)) = (TOP + ROW * row, point);
            write(area, &line_of.name, (10, top), FONT, HPos::Left)?;
            let (above, below) = (top + LINE + 1, top + 2 * LINE + 1);
            let bar = [(10, above), (10 + length(y).max(1), below)];
            area.draw(&Rectangle::new(bar, colour.mix(0.75).filled()))?;
            let middle = (above + below) / 2;
            if error > 0.0 {
                line(
                    area,
                    (10 + length(y - error), middle),
                    (10 + length(y + error), middle),
                    TEXT,
                    2,
                )?;
            }
            let at = (18 + length(y + error), above + 2);
            write(area, &value(point), at, FONT, HPos::Left)?;
        }
        Ok(())
    })
}

/// Lines over their x, with ticks where points are.
fn plot(texts: &Texts<'_>, lines: &[Series], places: &[f64]) -> Drawing<String> {
    let names: Vec<Vec<String>> = lines.iter().map(|l| wrap(&l.name)).collect();
    let widest = names.iter().flatten().map(|n| width(n)).max().unwrap_or(0);
    let right = WIDTH - widest - 44;
    let all_names = LINE * names.iter().map(Vec::len).sum::<usize>() as i32 + 6 * names.len() as i32;
    let plot_height = all_names.max(LEAST_HEIGHT);
    let bottom = TOP + plot_height;
    let high = lines
        .iter()
        .flat_map(|l| &l.points)
        .map(|p| p.1 + p.2)
        .fold(0.0, f64::max);
    let ticks = ticks(high);
    let high = ticks.last().copied().unwrap_or(1.0).max(high).max(1e-9);
    let across = Across::new(places, LEFT + 12, right - 8);
    let down = |y: f64| bottom - ((y.max(0.0) / high) * f64::from(plot_height)).round() as i32;
    draw(bottom + BOTTOM, texts.title, |area| {
        write(area, texts.y, (10, 38), FONT, HPos::Left)?;
        let digits = digits(ticks.get(1).copied().unwrap_or(1.0) * 10.0);
        for &tick in &ticks {
            line(area, (LEFT, down(tick)), (right, down(tick)), GRID, 1)?;
            let label = trimmed(format!("{tick:.digits$}"));
            write(area, &label, (LEFT - 6, down(tick) - FONT / 2), FONT, HPos::Right)?;
        }
        line(area, (LEFT, bottom), (right, bottom), TEXT, 1)?;
        for &x in &across.labelled() {
            line(area, (across.at(x), bottom), (across.at(x), bottom + 5), TEXT, 1)?;
            write(area, &short(x), (across.at(x), bottom + 9), FONT, HPos::Center)?;
        }
        write(area, texts.x, ((LEFT + right) / 2, bottom + 30), FONT, HPos::Center)?;
        let ends: Vec<i32> = lines
            .iter()
            .map(|l| l.points.last().map_or(bottom, |p| down(p.1)))
            .collect();
        let tops = spread(&ends, &names, TOP - LINE / 2, bottom + LINE / 2);
        for (((of, colour), name), top) in colours(lines).zip(&names).zip(tops) {
            let path: Vec<(i32, i32)> = of.points.iter().map(|p| (across.at(p.0), down(p.1))).collect();
            for (&(x, y), &(_, value, error)) in path.iter().zip(&of.points) {
                if error > 0.0 {
                    line(area, (x, down(value - error)), (x, down(value + error)), colour, 1)?;
                }
                area.draw(&Circle::new((x, y), 3, colour.filled()))?;
            }
            // From the line's end to its name.
            let middle = top + LINE / 2;
            if let Some(&end) = path.last() {
                line(area, (end.0 + 5, end.1), (right + 12, middle), colour, 1)?;
            }
            line(area, (right + 12, middle), (right + 26, middle), colour, 4)?;
            area.draw(&PathElement::new(path, colour.stroke_width(2)))?;
            for (text, row) in name.iter().zip(0..) {
                write(area, text, (right + 32, top + LINE * row), FONT, HPos::Left)?;
            }
        }
        Ok(())
    })
}

/// Where values of x stand: in proportion, or evenly where that would put labels over each other.
struct Across<'a> {
    places: &'a [f64],
    left: i32,
    right: i32,
    evenly: bool,
}

impl<'a> Across<'a> {
    fn new(places: &'a [f64], left: i32, right: i32) -> Self {
        let mut across = Self {
            places,
            left,
            right,
            evenly: false,
        };
        across.evenly = across.labelled().len() < places.len();
        across
    }

    fn at(&self, x: f64) -> i32 {
        let (first, last) = (self.places.first(), self.places.last());
        let (first, last) = (first.copied().unwrap_or(0.0), last.copied().unwrap_or(1.0));
        let share = if self.evenly {
            let before = self.places.iter().filter(|&&p| p < x).count();
            before as f64 / (self.places.len().max(2) - 1) as f64
        } else {
            (x - first) / (last - first)
        };
        self.left + (share * f64::from(self.right - self.left)).round() as i32
    }

    /// The values whose labels have room beside each other.
    fn labelled(&self) -> Vec<f64> {
        let mut found: Vec<f64> = Vec::new();
        let half = |x: f64| width(&short(x)) / 2;
        for &x in self.places {
            let end = found.last().map(|&l| self.at(l) + half(l) + 4);
            if end.is_none_or(|end| self.at(x) - half(x) > end) {
                found.push(x);
            }
        }
        found
    }
}

/// Tops of names beside the ends of their lines, moved apart where they would cover each other.
fn spread(ends: &[i32], names: &[Vec<String>], top: i32, bottom: i32) -> Vec<i32> {
    let height = |i: usize| LINE * names.get(i).map_or(1, Vec::len) as i32 + 4;
    let mut order: Vec<usize> = (0..ends.len()).collect();
    order.sort_by_key(|&i| ends.get(i).copied());
    let mut tops = vec![0; ends.len()];
    let mut free = top;
    for &i in &order {
        if let (Some(slot), Some(&end)) = (tops.get_mut(i), ends.get(i)) {
            *slot = (end - height(i) / 2).max(free);
            free = *slot + height(i);
        }
    }
    // Back up from the bottom.
    let mut limit = bottom.max(free.min(bottom));
    for &i in order.iter().rev() {
        if let Some(slot) = tops.get_mut(i) {
            *slot = (*slot).min(limit - height(i));
            limit = *slot;
        }
    }
    tops
}

/// A name in lines, broken behind commas, and at spaces where a part is too long.
fn wrap(name: &str) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for part in name.split_inclusive(", ").map(str::trim_end) {
        let mut line = String::new();
        for word in part.split(' ') {
            if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > NAME {
                lines.push(std::mem::take(&mut line));
            }
            if !line.is_empty() {
                line.push(' ');
            }
            line += word;
        }
        lines.push(line);
    }
    lines
}

/// Width of a text in a wide font, about: nothing says which one a reader has.
fn width(text: &str) -> i32 {
    text.chars().count() as i32 * FONT * 62 / 100
}

/// Three to six round numbers from 0 to `high` or a little above.
fn ticks(high: f64) -> Vec<f64> {
    if high <= 0.0 {
        return vec![0.0, 1.0];
    }
    let unit = 10f64.powf((high / 5.0).log10().floor());
    // A hair above a round number, as an error's end is, is no reason for another step.
    let steps = [1.0, 2.0, 2.5, 5.0, 10.0].map(|m| m * unit);
    let step = steps.into_iter().find(|s| s * 5.1 >= high).unwrap_or(10.0 * unit);
    let count = (high / step - 0.1).ceil().max(1.0) as usize;
    (0..=count).map(|i| i as f64 * step).collect()
}

/// Decimals that show numbers up to `high` in three digits.
fn digits(high: f64) -> usize {
    (2.0 - high.log10().floor()).clamp(0.0, 9.0) as usize
}

/// A number without trailing zeros.
pub fn short(v: f64) -> String {
    trimmed(format!("{v:.3}"))
}

fn trimmed(text: String) -> String {
    if !text.contains('.') {
        return text;
    }
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".to_owned() } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXTS: Texts<'static> = Texts {
        title: "t",
        x: "x",
        y: "y",
    };

    fn series(name: &str, points: &[(f64, f64, f64)]) -> Series {
        Series {
            name: name.into(),
            points: points.to_vec(),
        }
    }

    /// Labels of a figure with the places that they stand at.
    fn labels(svg: &str) -> Vec<(String, i32, i32)> {
        let number = |tag: &str, name: &str| -> i32 {
            let (_, rest) = tag.split_once(&format!(" {name}=\"")).unwrap();
            rest.split('"').next().unwrap().parse().unwrap()
        };
        svg.split("<text")
            .skip(1)
            .map(|t| {
                let (tag, rest) = t.split_once('>').unwrap();
                let text = rest.split('<').next().unwrap().trim();
                (text.to_owned(), number(tag, "x"), number(tag, "y"))
            })
            .collect()
    }

    #[test]
    fn figures_hold_their_lines_and_refuse_nothing() {
        let line = series(
            "Retro <w>",
            &[(0.1, 20.0, 1.0), (0.2, 40.0, f64::NAN), (0.3, 60.0, 0.0)],
        );
        let svg = figure(&TEXTS, &[line]).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("Retro &lt;w&gt;"), "{svg}");
        // One point without a finite error is left out.
        assert_eq!(svg.matches("<circle").count(), 2);
        assert!(figure(&TEXTS, &[]).is_err());
        assert!(figure(&TEXTS, &[series("a", &[])]).is_err());
    }

    /// Names stand right of all data, at their lines' ends, none over another; ticks stand where points are.
    #[test]
    fn names_cover_no_data_and_ticks_are_where_points_are() {
        let of = |i: usize| {
            let y = 50.0 + i as f64;
            series(&format!("line {i}"), &[(1.0, y, 1.0), (2.0, y, 1.0), (4.0, y, 1.0)])
        };
        let lines: Vec<Series> = (0..9).map(of).collect();
        let svg = figure(&TEXTS, &lines).unwrap();
        let found = labels(&svg);
        let right = svg
            .split("<circle cx=\"")
            .skip(1)
            .map(|c| c.split('"').next().unwrap().parse::<i32>().unwrap());
        let right = right.max().unwrap();
        let mut tops: Vec<(i32, String)> = Vec::new();
        for (text, x, y) in &found {
            if text.starts_with("line") {
                assert!(*x > right + 10, "{text} at {x}, data up to {right}");
                tops.push((*y, text.clone()));
            }
        }
        tops.sort();
        assert_eq!(tops.len(), 9);
        assert!(tops.windows(2).all(|w| w[1].0 - w[0].0 >= LINE), "{tops:?}");
        // The order of the lines, from above.
        assert!(tops.windows(2).all(|w| w[0].1 > w[1].1), "{tops:?}");
        let below = found.iter().map(|l| l.2).max().unwrap() - 21;
        let ticks: Vec<&str> = found.iter().filter(|l| l.2 == below).map(|l| l.0.as_str()).collect();
        assert_eq!(ticks, ["1", "2", "4"]);
    }

    #[test]
    fn one_budget_is_bars_with_their_values() {
        let lines = [
            series("dense", &[(0.1, 100.0, 0.0)]),
            series("Quest", &[(0.1, 23.04, 3.6)]),
        ];
        let svg = figure(&TEXTS, &lines).unwrap();
        let texts: Vec<String> = labels(&svg).into_iter().map(|l| l.0).collect();
        assert_eq!(texts, ["t", "y", "dense", "100.0", "Quest", "23.0 ± 3.6"]);
        assert!(!svg.contains("<circle"));
    }

    #[test]
    fn places_are_in_proportion_where_labels_have_room() {
        let near = [0.02, 0.1, 512.0];
        let across = Across::new(&near, 0, 200);
        assert_eq!(near.map(|x| across.at(x)), [0, 100, 200]);
        let far = [1.0, 2.0, 5.0];
        let across = Across::new(&far, 0, 200);
        assert_eq!(far.map(|x| across.at(x)), [0, 50, 200]);
        // More than have room even so.
        let many: Vec<f64> = (0..40).map(f64::from).collect();
        let shown = Across::new(&many, 0, 200).labelled().len();
        assert!((5..20).contains(&shown), "{shown}");
    }

    #[test]
    fn ticks_are_round_and_names_are_broken_behind_commas() {
        assert_eq!(ticks(100.0), [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]);
        assert_eq!(ticks(101.0).last(), Some(&100.0));
        assert_eq!(ticks(0.31).len(), 4);
        assert_eq!(ticks(0.0), [0.0, 1.0]);
        assert_eq!(
            wrap("recommended (w = 2), pages of 4, at least 128 pages of them"),
            ["recommended (w = 2),", "pages of 4,", "at least 128 pages", "of them"]
        );
        assert_eq!(
            (short(0.10), short(100.0), short(-0.0)),
            ("0.1".into(), "100".into(), "0".into())
        );
    }
}
