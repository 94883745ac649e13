//! `resources.limits`, and quantities in general.

use super::PodError;
use super::quantity::{self, BadQuantity};
use super::yaml::{Node, invalid};
use crate::units::Bytes;

/// `resources.limits`.
#[derive(Default)]
pub(super) struct Limits {
    pub(super) memory: Option<Bytes>,
    pub(super) cpu_milli: Option<u32>,
    pub(super) disk: Option<Bytes>,
}

pub(super) fn limits(node: Option<Node<'_>>) -> Result<Limits, PodError> {
    let Some(node) = node else {
        return Ok(Limits::default());
    };
    let mut resources = node.fields()?;
    let limits = resources.get("limits");
    resources.finish()?;
    let Some(limits) = limits else {
        return Ok(Limits::default());
    };
    let mut limits = limits.fields()?;
    let memory = match limits.get("memory") {
        Some(node) => Some(bytes(&node.path, &node.text_or_number()?)?),
        None => None,
    };
    let cpu = match limits.get("cpu") {
        Some(node) => Some(cpu_milli(&node.path, &node.text_or_number()?)?),
        None => None,
    };
    let disk = match limits.get("ephemeral-storage") {
        Some(node) => Some(bytes(&node.path, &node.text_or_number()?)?),
        None => None,
    };
    limits.finish()?;
    Ok(Limits {
        memory,
        cpu_milli: cpu,
        disk,
    })
}

pub(super) fn bytes(path: &str, text: &str) -> Result<Bytes, PodError> {
    if text.ends_with('m') {
        let problem = format!(
            "`{text}` is thousandths of a byte; did you mean `{}Mi`?",
            text.trim_end_matches('m')
        );
        return invalid(path, problem);
    }
    let milli = milli(path, text, "512Mi")?;
    match u64::try_from(milli.div_ceil(1000)) {
        Ok(bytes) => Ok(Bytes(bytes)),
        Err(_) => invalid(path, format!("`{text}` is too large")),
    }
}

fn cpu_milli(path: &str, text: &str) -> Result<u32, PodError> {
    match u32::try_from(milli(path, text, "500m")?) {
        Ok(milli) => Ok(milli),
        Err(_) => invalid(path, format!("`{text}` is too large")),
    }
}

fn milli(path: &str, text: &str, example: &str) -> Result<u128, PodError> {
    match quantity::milli(text) {
        Ok(milli) => Ok(milli),
        Err(BadQuantity::Form) => invalid(
            path,
            format!("`{text}` is not a quantity, such as {example}"),
        ),
        Err(BadQuantity::TooLarge) => invalid(path, "the number is too long"),
    }
}
