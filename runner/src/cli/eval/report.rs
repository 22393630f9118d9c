//! What a comparison ends with: the table on stdout, and the reports that were asked for.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::args::EvalArgs;
use crate::{
    Interrupted,
    cli::output::{print, write_whole},
    eval::{self, html},
    progress::note,
    tables::{Alignment, markdown},
};

/// What a comparison has found.
pub(super) struct Report<'a, T> {
    pub(super) title: &'a str,
    /// Lines about all rows.
    pub(super) facts: &'a [String],
    pub(super) table: &'a [Vec<String>],
    /// The rows of the table that are complete.
    pub(super) rows: &'a [T],
    /// Rows of a complete run.
    pub(super) total: usize,
}

/// Figures by name, as SVG.
type Figures = Vec<(String, String)>;

impl<T: Serialize> Report<'_, T> {
    /// Ends the command: prints the table and writes the reports that were asked for, each whatever becomes of the
    /// other. An interrupted run ends with that error, and writes no reports.
    pub(super) fn end(
        &self,
        args: &EvalArgs,
        interrupted: Option<Interrupted>,
        figures: impl Fn() -> Result<Figures, eval::Error>,
    ) -> Result<()> {
        if let Some(interrupted) = interrupted {
            self.end_early(args)?;
            return Err(interrupted.into());
        }
        let figures = match (&args.html, &args.figures) {
            (None, None) => Vec::new(),
            _ => figures()?,
        };
        let written = self.write(args, &figures);
        self.print(args).and(written)
    }

    /// Prints the rows that were complete when the run was interrupted, and says how to resume it.
    fn end_early(&self, args: &EvalArgs) -> Result<()> {
        if !self.rows.is_empty() || args.json {
            self.print(args)?;
        }
        let kept = match &args.resume {
            Some(path) => format!(
                "{} has the results so far; the same command resumes the run",
                path.display()
            ),
            None => "give --resume FILE to make runs resumable".to_owned(),
        };
        note(&format!(
            "{} of {} rows are complete; {kept}",
            self.rows.len(),
            self.total
        ));
        Ok(())
    }

    fn print(&self, args: &EvalArgs) -> Result<()> {
        let Self { facts, table, rows, .. } = self;
        if args.json {
            print(&format!("{}\n", serde_json::json!({ "facts": facts, "rows": rows })))
        } else {
            print(&markdown(table, Alignment::Left))
        }
    }

    fn write(&self, args: &EvalArgs, figures: &[(String, String)]) -> Result<()> {
        if let Some(path) = &args.html {
            write_whole(path, &html::page(self.title, self.facts, self.table, figures))?;
        }
        if let Some(folder) = &args.figures {
            fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
            for (name, svg) in figures {
                write_whole(&folder.join(format!("{name}.svg")), svg)?;
            }
        }
        Ok(())
    }
}

/// Whether files can be made in the folder that an output goes to.
pub(super) fn writable(output: &Path, folder: &Path) -> Result<()> {
    let cannot = || format!("cannot write {}", output.display());
    ensure!(folder.is_dir(), "{}: {} is no folder", cannot(), folder.display());
    tempfile::tempfile_in(folder).map(drop).with_context(cannot)
}
