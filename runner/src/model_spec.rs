//! A model and its options as command lines have them: `NAME=DIR[,window=W][,budget=B][,rectify=N][,graph=NAME]`.

use std::{path::PathBuf, str::FromStr};

use retro_contract::Budget;

/// Window, budget and rectifying passes to run a model with; `None`: as converted, and no passes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PolicyOptions {
    /// The window w.
    pub window: Option<usize>,
    /// Pages that a step reads.
    pub budget: Option<Budget>,
    /// Tokens between two rectifying passes.
    pub rectify: Option<usize>,
}

impl PolicyOptions {
    /// Parses `window=W`, `budget=B` or `rectify=N`; returns false for any other option.
    ///
    /// # Errors
    /// When the value cannot be parsed.
    pub fn set(&mut self, option: &str) -> Result<bool, String> {
        match option.split_once('=') {
            Some(("window", w)) => self.window = Some(w.parse().map_err(|_| format!("window {w:?} is no number"))?),
            Some(("budget", b)) => self.budget = Some(b.parse()?),
            Some(("rectify", n)) => self.rectify = Some(n.parse().map_err(|_| format!("rectify {n:?} is no number"))?),
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// A named model and its options.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// The name in tables.
    pub name: String,
    /// Model folder or ONNX file.
    pub folder: PathBuf,
    /// Window, budget and rectifying passes.
    pub options: PolicyOptions,
    /// Which graph of the folder; `None`: the default one.
    pub graph: Option<String>,
}

impl FromStr for ModelSpec {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        const FORM: &str = "expected NAME=DIR[,window=W][,budget=B][,rectify=N][,graph=NAME]";
        // A name may contain "=" ("Retro w=2"): the folder starts after the last "=" before the first comma.
        let (head, rest) = s.split_once(',').unwrap_or((s, ""));
        let (name, folder) = head.rsplit_once('=').ok_or(FORM)?;
        if name.is_empty() || folder.is_empty() {
            return Err(FORM.into());
        }
        let (mut options, mut graph) = (PolicyOptions::default(), None);
        for option in rest.split(',').filter(|o| !o.is_empty()) {
            if let Some(name) = option.strip_prefix("graph=") {
                graph = Some(name.to_owned());
            } else if !options.set(option)? {
                return Err(format!("{option:?}: {FORM}"));
            }
        }
        Ok(Self {
            name: name.into(),
            folder: folder.into(),
            options,
            graph,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_parse_with_equals_signs_in_their_names() {
        let spec: ModelSpec = "Retro w=2=out/ledger-retro,window=2,budget=0.25".parse().unwrap();
        assert_eq!(
            (spec.name.as_str(), spec.folder.to_str()),
            ("Retro w=2", Some("out/ledger-retro"))
        );
        assert_eq!(
            (spec.options.window, spec.options.budget),
            (Some(2), Some(Budget::Ratio(0.25)))
        );
        let plain: ModelSpec = "dense=out/ledger".parse().unwrap();
        assert_eq!((plain.options, plain.graph), (PolicyOptions::default(), None));
        let one: ModelSpec = "q4=out/js,graph=q4f16,window=2".parse().unwrap();
        assert_eq!((one.graph.as_deref(), one.options.window), (Some("q4f16"), Some(2)));
        let passes: ModelSpec = "a=out,rectify=32".parse().unwrap();
        assert_eq!(passes.options.rectify, Some(32));
        for bad in [
            "dense",
            "=out",
            "a=",
            "a=b,window=x",
            "a=b,pages=3",
            "a=b,rectify=x",
            "a=b,budget=2.5",
        ] {
            assert!(bad.parse::<ModelSpec>().is_err(), "{bad}");
        }
    }
}
