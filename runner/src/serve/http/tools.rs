//! The fields that ask for output of a certain form: `response_format`, `tools` and `tool_choice`.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{
    app::Loaded,
    error::{ApiError, Result},
    fields::Fields,
    tool_calls::Parsed,
};
use crate::serve::constraint::{Constraint, Grammars};

/// The most functions of a request.
const MOST_TOOLS: usize = 128;

/// Functions that the model may call.
#[derive(Clone, Debug)]
pub struct Tools {
    /// As the client describes them.
    pub list: Vec<Value>,
    pub names: Vec<String>,
    /// Only the first call of an answer counts.
    pub one_call: bool,
    must: Must,
}

/// What the model must do.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Must {
    Choose,
    CallAny,
    Call(String),
}

#[derive(Deserialize)]
struct Tool {
    #[serde(rename = "type")]
    kind: String,
    function: Function,
}

#[derive(Deserialize)]
struct Function {
    name: String,
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "expected none, auto, required, or a function's name as in OpenAI's API"
)]
enum Choice {
    Word(String),
    Function {
        #[serde(rename = "type")]
        _kind: Option<String>,
        function: Function,
    },
}

impl Tools {
    /// Takes the fields. `None` where the model may call nothing.
    pub fn take(fields: &mut Fields) -> Result<Option<Self>> {
        let list: Vec<Value> = fields.take("tools")?.unwrap_or_default();
        let choice: Option<Choice> = fields.take("tool_choice")?;
        let parallel: Option<bool> = fields.take("parallel_tool_calls")?;
        if list.len() > MOST_TOOLS {
            return Err(ApiError::field("tools", format!("at most {MOST_TOOLS}")));
        }
        let mut names = Vec::with_capacity(list.len());
        for (i, tool) in list.iter().enumerate() {
            names.push(name_of(tool).map_err(|why| ApiError::field(&format!("tools[{i}]"), why))?);
        }
        let wrong = |message: String| Err(ApiError::field("tool_choice", message));
        let must = match choice {
            None => Must::Choose,
            Some(Choice::Word(word)) => match word.as_str() {
                "none" => return Ok(None),
                "auto" => Must::Choose,
                "required" if names.is_empty() => return wrong("there are no tools".to_owned()),
                "required" => Must::CallAny,
                other => return wrong(format!("{other:?}: expected none, auto, required or a function")),
            },
            Some(Choice::Function { function, .. }) if names.contains(&function.name) => Must::Call(function.name),
            Some(Choice::Function { function, .. }) => {
                return wrong(format!("there is no tool {:?}", function.name));
            }
        };
        Ok((!list.is_empty()).then_some(Self {
            list,
            names,
            one_call: parallel == Some(false),
            must,
        }))
    }

    /// The schema of the call that the model must make; `None` where it may choose.
    fn schema(&self) -> Option<Value> {
        let call = |tool: &Value| {
            let function = tool.get("function").unwrap_or(&Value::Null);
            let mut parameters = function.get("parameters").filter(|p| p.is_object()).cloned();
            // A function takes the arguments that it names: a small model would invent more without an end.
            if let Some(parameters) = parameters.as_mut().and_then(Value::as_object_mut)
                && parameters.contains_key("properties")
                && !parameters.contains_key("additionalProperties")
            {
                parameters.insert("additionalProperties".to_owned(), json!(false));
            }
            json!({
                "type": "object",
                "properties": {
                    "name": {"const": function.get("name")},
                    "arguments": parameters.unwrap_or_else(|| json!({"type": "object"})),
                },
                "required": ["name", "arguments"],
                "additionalProperties": false,
            })
        };
        let named = |name: &String| self.names.iter().position(|n| n == name).and_then(|i| self.list.get(i));
        match &self.must {
            Must::Choose => None,
            Must::CallAny => Some(json!({"anyOf": self.list.iter().map(call).collect::<Vec<_>>()})),
            Must::Call(name) => named(name).map(call),
        }
    }

    /// A text taken apart, with the calls that the client takes.
    pub fn calls_taken(&self, mut parsed: Parsed) -> Parsed {
        if self.one_call {
            parsed.calls.truncate(1);
        }
        parsed
    }

    /// What tells a model of its tools whose template does not: the text that Hermes' and Qwen's templates have.
    pub fn instructions(&self) -> String {
        let list: Vec<String> = self.list.iter().map(Value::to_string).collect();
        format!(
            "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function \
             signatures within <tools></tools> XML tags:\n<tools>\n{}\n</tools>\n\nFor each function call, return a json \
             object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{{\"name\": \
             <function-name>, \"arguments\": <args-json-object>}}\n</tool_call>",
            list.join("\n")
        )
    }
}

/// The name of the function that a tool is.
fn name_of(tool: &Value) -> Result<String, String> {
    let Tool { kind, function } = serde_json::from_value(tool.clone()).map_err(|e| e.to_string())?;
    if kind != "function" {
        return Err(format!("its type is {kind:?}: expected function"));
    }
    let name = function.name;
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    if name.is_empty() || name.len() > 64 || !name.chars().all(plain) {
        return Err(format!(
            "the name {name:?}: expected 1 to 64 letters, digits, _, - or ."
        ));
    }
    Ok(name)
}

#[derive(Deserialize)]
struct Format {
    #[serde(rename = "type")]
    kind: String,
    json_schema: Option<Map<String, Value>>,
}

/// What the answer must follow, by `response_format` and the tools.
pub fn constraint(fields: &mut Fields, tools: Option<&Tools>, loaded: &Loaded) -> Result<Option<Constraint>> {
    const FORMAT: &str = "response_format";
    let format: Option<Format> = fields.take(FORMAT)?;
    let called = tools.and_then(Tools::schema);
    let format = format.filter(|f| f.kind != "text");
    if let (Some(_), Some(_)) = (&format, &called) {
        return Err(ApiError::field(FORMAT, "not where tool_choice demands a call"));
    }
    if let Some(schema) = called {
        let made = grammars(loaded, "tool_choice")?.json_schema(&schema);
        return made.map(Some).map_err(|e| ApiError::field("tools", e));
    }
    let Some(format) = format else { return Ok(None) };
    let made = match (format.kind.as_str(), &format.json_schema) {
        ("json_object", None) => grammars(loaded, FORMAT)?.json_object(),
        ("json_schema", Some(named)) => {
            let schema = named.get("schema");
            let schema = schema.ok_or_else(|| ApiError::field(FORMAT, "json_schema has no schema"))?;
            grammars(loaded, FORMAT)?.json_schema(schema)
        }
        ("json_schema", None) => return Err(ApiError::field(FORMAT, "json_schema is missing")),
        (other, _) => {
            let message = format!("{other:?}: expected text, json_object or json_schema");
            return Err(ApiError::field(FORMAT, message));
        }
    };
    made.map(Some).map_err(|e| ApiError::field(FORMAT, e))
}

fn grammars<'a>(loaded: &'a Loaded, param: &str) -> Result<&'a Grammars> {
    let refused = |why: &str| ApiError::field(param, format!("not with this model: {why}"));
    loaded.grammars().map_err(refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(body: Value) -> Result<Option<Tools>> {
        Tools::take(&mut Fields::parse(body.to_string().as_bytes()).unwrap())
    }

    fn tool(name: &str) -> Value {
        json!({"type": "function", "function": {"name": name, "parameters": {"type": "object"}}})
    }

    #[test]
    fn choices_are_what_they_say() {
        let tools = json!([tool("a"), tool("b")]);
        assert!(take(json!({})).unwrap().is_none());
        assert!(take(json!({"tools": tools, "tool_choice": "none"})).unwrap().is_none());
        let auto = take(json!({"tools": tools})).unwrap().unwrap();
        assert_eq!((auto.schema(), auto.names.len()), (None, 2));
        let any = take(json!({"tools": tools, "tool_choice": "required"}))
            .unwrap()
            .unwrap();
        assert_eq!(any.schema().unwrap()["anyOf"][1]["properties"]["name"]["const"], "b");
        let named = json!({"type": "function", "function": {"name": "b"}});
        let one = take(json!({"tools": tools, "tool_choice": named, "parallel_tool_calls": false}));
        let one = one.unwrap().unwrap();
        assert_eq!(one.schema().unwrap()["properties"]["name"]["const"], "b");
        assert!(one.one_call);
    }

    #[test]
    fn arguments_that_a_function_does_not_name_are_not_made() {
        let arguments = |parameters: Value| {
            let mut tool = tool("a");
            tool["function"]["parameters"] = parameters;
            let tools = take(json!({"tools": [tool], "tool_choice": "required"}))
                .unwrap()
                .unwrap();
            tools.schema().unwrap()["anyOf"][0]["properties"]["arguments"]["additionalProperties"].clone()
        };
        let properties = json!({"x": {"type": "integer"}});
        assert_eq!(arguments(json!({"type": "object", "properties": properties})), false);
        let open = json!({"type": "object", "properties": properties, "additionalProperties": true});
        assert_eq!(arguments(open), true);
        assert_eq!(arguments(json!({"type": "object"})), Value::Null);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, param) in [
            (json!({"tools": [{"type": "web"}]}), "tools[0]"),
            (json!({"tools": [tool("a"), tool("b c")]}), "tools[1]"),
            (json!({"tool_choice": "required"}), "tool_choice"),
            (json!({"tools": [tool("a")], "tool_choice": "a"}), "tool_choice"),
            (
                json!({"tools": [tool("a")], "tool_choice": {"type": "function", "function": {"name": "b"}}}),
                "tool_choice",
            ),
            (json!({"tools": 3}), "tools"),
        ] {
            assert_eq!(take(body.clone()).unwrap_err().param.as_deref(), Some(param), "{body}");
        }
    }
}
