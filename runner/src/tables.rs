//! Tables as text: Markdown that can be read as it is, and CSV.

use std::{io, string::FromUtf8Error};

use comfy_table::{CellAlignment, ContentArrangement, Table, presets::ASCII_MARKDOWN};

/// The result of a table's writing.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What is wrong with a table.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Rows differ in length.
    #[error(transparent)]
    Csv(#[from] csv::Error),
    /// Its text cannot be taken out of the writer.
    #[error("cannot write CSV")]
    Write(#[source] io::Error),
    /// Its text is not in UTF-8.
    #[error(transparent)]
    Text(#[from] FromUtf8Error),
}

/// Where the text of a cell stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alignment {
    /// At the left of its column.
    Left,
    /// At the right of its column, as numbers are read best.
    Right,
}

/// A Markdown table whose columns are as wide as their longest cell. `lines`: the header, then the rows.
pub fn markdown<S: AsRef<str>>(lines: &[Vec<S>], alignment: Alignment) -> String {
    let cells = |line: &Vec<S>| line.iter().map(|cell| cell.as_ref().to_owned()).collect::<Vec<_>>();
    let mut table = Table::new();
    table
        .load_style(ASCII_MARKDOWN)
        .set_content_arrangement(ContentArrangement::Disabled);
    if let Some((header, rows)) = lines.split_first() {
        table.set_header(cells(header)).add_rows(rows.iter().map(cells));
    }
    if alignment == Alignment::Right {
        for column in table.column_iter_mut() {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let mut out = String::new();
    for (i, line) in table.lines().enumerate() {
        // Markdown says alignment in the rule below the header.
        match alignment {
            Alignment::Right if i == 1 => out += &line.replace("-|", ":|"),
            _ => out += &line,
        }
        out.push('\n');
    }
    out
}

/// Comma-separated values, cells quoted where they need it. `lines`: the header, then the rows.
///
/// # Errors
/// When rows differ in length.
pub fn csv<S: AsRef<str>>(lines: &[Vec<S>]) -> Result<String> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    for line in lines {
        writer.write_record(line.iter().map(|cell| cell.as_ref().as_bytes()))?;
    }
    let bytes = writer.into_inner().map_err(|e| Error::Write(e.into_error()))?;
    Ok(String::from_utf8(bytes)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_cells() {
        let lines = [vec!["policy", "right"], vec!["dense", "100.0 ± 0.0"]];
        assert_eq!(
            markdown(&lines, Alignment::Left),
            "| policy | right       |\n|--------|-------------|\n| dense  | 100.0 ± 0.0 |\n"
        );
        assert_eq!(
            markdown(&lines, Alignment::Right),
            "| policy |       right |\n|-------:|------------:|\n|  dense | 100.0 ± 0.0 |\n"
        );
    }

    #[test]
    fn cells_with_commas_and_quotes_are_quoted() {
        let lines = [vec!["what", "ms"], vec!["a, \"b\"", "1.25"], vec!["", "2"]];
        assert_eq!(csv(&lines).unwrap(), "what,ms\n\"a, \"\"b\"\"\",1.25\n,2\n");
        assert!(csv(&[vec!["a", "b"], vec!["c"]]).is_err());
    }
}
