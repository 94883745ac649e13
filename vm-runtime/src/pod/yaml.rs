//! YAML values with their path, so that every message can name the field.

use serde_yaml_ng::{Mapping, Value};

use super::PodError;

/// Longest path in a message, in characters: keys come from the file.
const MAX_PATH: usize = 200;

/// A value and the path that led to it.
pub(super) struct Node<'a> {
    pub(super) path: String,
    value: &'a Value,
}

/// The fields of a mapping, taken out one by one; what is left at the end is refused.
pub(super) struct Fields<'a> {
    path: String,
    mapping: &'a Mapping,
    known: Vec<&'static str>,
}

pub(super) fn invalid<T>(path: &str, problem: impl Into<String>) -> Result<T, PodError> {
    Err(PodError::Invalid {
        path: path.to_owned(),
        problem: problem.into(),
    })
}

/// A key for a path: quoted if it is not a plain word.
fn join(path: &str, key: &str) -> String {
    let plain = !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric());
    let key: String = key.chars().take(MAX_PATH).collect();
    match (plain, path.is_empty()) {
        (true, true) => key,
        (true, false) => format!("{path}.{key}"),
        (false, _) => format!("{path}[{key:?}]"),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Sequence(_) => "a list",
        Value::Mapping(_) => "a mapping",
        Value::Tagged(_) => "a tagged value",
    }
}

impl<'a> Node<'a> {
    pub(super) fn root(value: &'a Value) -> Self {
        Self {
            path: String::new(),
            value,
        }
    }

    fn wrong<T>(&self, wanted: &str) -> Result<T, PodError> {
        let path = if self.path.is_empty() {
            "the file"
        } else {
            &self.path
        };
        invalid(path, format!("{} where {wanted} belongs", kind(self.value)))
    }

    pub(super) fn fields(&self) -> Result<Fields<'a>, PodError> {
        match self.value {
            Value::Mapping(mapping) => Ok(Fields {
                path: self.path.clone(),
                mapping,
                known: Vec::new(),
            }),
            _ => self.wrong("a mapping"),
        }
    }

    pub(super) fn list(&self) -> Result<Vec<Node<'a>>, PodError> {
        let Value::Sequence(items) = self.value else {
            return self.wrong("a list");
        };
        Ok(items
            .iter()
            .enumerate()
            .map(|(index, value)| Node {
                path: format!("{}[{index}]", self.path),
                value,
            })
            .collect())
    }

    /// Text. A number or a truth value is refused with a hint: Kubernetes wants quotes there too.
    pub(super) fn text(&self) -> Result<&'a str, PodError> {
        match self.value {
            Value::String(text) => Ok(text),
            Value::Bool(_) | Value::Number(_) => invalid(
                &self.path,
                format!("{} where text belongs; put it in quotes", kind(self.value)),
            ),
            _ => self.wrong("text"),
        }
    }

    pub(super) fn texts(&self) -> Result<Vec<String>, PodError> {
        let items = self.list()?;
        items
            .iter()
            .map(|item| item.text().map(str::to_owned))
            .collect()
    }

    /// Text, or a number in its text form: a quantity may be written either way.
    pub(super) fn text_or_number(&self) -> Result<String, PodError> {
        match self.value {
            Value::String(text) => Ok(text.clone()),
            Value::Number(number) => Ok(number.to_string()),
            _ => self.wrong("a quantity"),
        }
    }

    /// A whole number between two.
    pub(super) fn number(&self, least: u32, most: u32) -> Result<u32, PodError> {
        let Value::Number(number) = self.value else {
            return self.wrong("a number");
        };
        let number = number.as_u64().and_then(|n| u32::try_from(n).ok());
        match number.filter(|n| (least..=most).contains(n)) {
            Some(number) => Ok(number),
            None => invalid(
                &self.path,
                format!("must be a number from {least} to {most}"),
            ),
        }
    }

    /// Name and value of each entry, both text.
    pub(super) fn text_map(&self) -> Result<Vec<(&'a str, Node<'a>)>, PodError> {
        let Value::Mapping(mapping) = self.value else {
            return self.wrong("a mapping");
        };
        mapping
            .iter()
            .map(|(key, value)| self.entry(key, value))
            .collect()
    }

    /// True or false.
    pub(super) fn truth(&self) -> Result<bool, PodError> {
        match self.value {
            Value::Bool(value) => Ok(*value),
            _ => self.wrong("true or false"),
        }
    }

    fn entry(&self, key: &'a Value, value: &'a Value) -> Result<(&'a str, Node<'a>), PodError> {
        let Value::String(key) = key else {
            return invalid(&self.path, format!("{} where a name belongs", kind(key)));
        };
        let path = join(&self.path, key);
        Ok((key, Node { path, value }))
    }
}

impl<'a> Fields<'a> {
    /// The field's path, whether it is there or not.
    pub(super) fn path(&self, key: &str) -> String {
        join(&self.path, key)
    }

    /// The field, if it is there and not empty.
    pub(super) fn get(&mut self, key: &'static str) -> Option<Node<'a>> {
        self.known.push(key);
        match self.mapping.get(key) {
            None | Some(Value::Null) => None,
            Some(value) => Some(Node {
                path: self.path(key),
                value,
            }),
        }
    }

    /// The field, which must be there.
    pub(super) fn require(&mut self, key: &'static str, hint: &str) -> Result<Node<'a>, PodError> {
        let path = self.path(key);
        self.get(key).ok_or_else(|| PodError::Missing {
            path,
            hint: hint.to_owned(),
        })
    }

    /// Refuses fields that nobody asked for.
    pub(super) fn finish(self) -> Result<(), PodError> {
        for key in self.mapping.keys() {
            let Value::String(key) = key else {
                let path = if self.path.is_empty() {
                    "the file"
                } else {
                    &self.path
                };
                return invalid(path, format!("{} where a field's name belongs", kind(key)));
            };
            if self.known.contains(&key.as_str()) {
                continue;
            }
            let near = self.known.iter().find(|known| is_near(known, key));
            return Err(PodError::Unsupported {
                path: self.path(key),
                hint: match near {
                    Some(near) => format!("did you mean `{near}`?"),
                    None => "remove it".to_owned(),
                },
            });
        }
        Ok(())
    }
}

/// Whether two names differ by case, or by one or two letters.
fn is_near(known: &str, written: &str) -> bool {
    if known.eq_ignore_ascii_case(written) {
        return true;
    }
    let (known, written) = (known.as_bytes(), written.as_bytes());
    if known.len().abs_diff(written.len()) > 2 || known.len() < 4 {
        return false;
    }
    // Levenshtein distance, one row at a time.
    let mut row: Vec<usize> = (0..=written.len()).collect();
    for (i, a) in known.iter().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, b) in written.iter().enumerate() {
            let substituted = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[written.len()] <= 2
}
