//! The chat template, as options choose it.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use serde_json::{Map, Value};

use crate::{
    ModelFolder,
    text::chat_template::{ChatTemplate, RenderOptions},
};

/// Which template turns messages into a prompt, and what it is given.
#[derive(Args)]
pub struct TemplateArgs {
    /// Chat template to use in place of the model's: a Jinja file.
    #[arg(long, value_name = "FILE")]
    template: Option<PathBuf>,
    /// System prompt, before what the user says.
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Variables for the template, as a JSON object: '{"enable_thinking": false}'.
    #[arg(long, value_name = "JSON")]
    chat_template_kwargs: Option<String>,
}

impl TemplateArgs {
    /// A template that a command names by itself, and nothing else.
    pub fn named(template: Option<PathBuf>) -> Self {
        Self {
            template,
            system: None,
            chat_template_kwargs: None,
        }
    }

    /// Whether one of the options is given.
    pub fn any(&self) -> bool {
        self.template.is_some() || self.system.is_some() || self.chat_template_kwargs.is_some()
    }

    /// The template that is named, else the model's, if it has one.
    pub fn find(&self, model: &ModelFolder) -> Result<Option<ChatTemplate>> {
        Ok(match &self.template {
            Some(file) => Some(ChatTemplate::from_file(file, model)?),
            None => ChatTemplate::find(model)?,
        })
    }

    /// What [`Self::find`] finds, for messages.
    pub fn describe(&self) -> String {
        let named = self.template.as_ref();
        named.map_or_else(
            || "the model's chat template".to_owned(),
            |file| file.display().to_string(),
        )
    }

    /// As [`Self::find`]; a model without a template is an error.
    pub fn demand(&self, model: &ModelFolder) -> Result<ChatTemplate> {
        self.find(model)?.with_context(|| {
            format!(
                "the model of {} has no chat template (chat_template.jinja, or chat_template in \
                 tokenizer_config.json): name one with --template FILE",
                model.graph.display()
            )
        })
    }

    /// What the template is given besides the messages.
    pub fn rendering(&self) -> Result<RenderOptions> {
        let variables = match &self.chat_template_kwargs {
            Some(text) => serde_json::from_str::<Map<String, Value>>(text)
                .with_context(|| format!("--chat-template-kwargs {text}: expected a JSON object"))?,
            None => Map::new(),
        };
        Ok(RenderOptions {
            variables,
            ..RenderOptions::default()
        })
    }
}
