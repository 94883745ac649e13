//! Probes and what else belongs to a container's life: ports, which probes name, and `lifecycle`.

use std::net::IpAddr;

use guest_agent::protocol::settings::{Check, Probe};

use super::PodError;
use super::yaml::{Fields, Node, invalid};

/// A day: nobody means more.
const LONGEST_S: u32 = 86_400;

/// A container's ports by name. Nothing else comes of them: a pod's ports are all reachable.
pub(super) struct Ports(Vec<(String, u16)>);

impl Ports {
    pub(super) fn read(node: Option<Node<'_>>) -> Result<Self, PodError> {
        let mut ports = Vec::new();
        for node in node.map_or(Ok(Vec::new()), |node| node.list())? {
            let mut fields = node.fields()?;
            let port = fields.require("containerPort", "a port has a number")?;
            let port = number16(&port)?;
            if let Some(node) = fields.get("protocol")
                && !matches!(node.text()?, "TCP" | "UDP" | "SCTP")
            {
                return invalid(&node.path, "must be TCP, UDP or SCTP");
            }
            if let Some(name) = fields.get("name") {
                ports.push((name.text()?.to_owned(), port));
            }
            if let Some(node) = fields.get("hostPort") {
                return Err(PodError::Unsupported {
                    path: node.path,
                    hint: "a pod has an address of its own: connect to that".to_owned(),
                });
            }
            fields.finish()?;
        }
        Ok(Self(ports))
    }

    fn find(&self, node: &Node<'_>) -> Result<u16, PodError> {
        let Ok(name) = node.text() else {
            return number16(node);
        };
        match self.0.iter().find(|(known, _)| known == name) {
            Some((_, port)) => Ok(*port),
            None => invalid(
                &node.path,
                format!("`{name}` is not one of the container's ports"),
            ),
        }
    }
}

/// `livenessProbe` and its kind.
pub(super) fn probe(node: Option<Node<'_>>, ports: &Ports) -> Result<Option<Probe>, PodError> {
    let Some(node) = node else { return Ok(None) };
    let path = node.path.clone();
    let mut fields = node.fields()?;
    let exec = fields.get("exec");
    let tcp = fields.get("tcpSocket");
    let http = fields.get("httpGet");
    let mut number = |key, least, default| match fields.get(key) {
        Some(node) => node.number(least, LONGEST_S),
        None => Ok(default),
    };
    let initial_delay_s = number("initialDelaySeconds", 0, 0)?;
    let period_s = number("periodSeconds", 1, 10)?;
    let timeout_s = number("timeoutSeconds", 1, 1)?;
    let successes = number("successThreshold", 1, 1)?;
    let failures = number("failureThreshold", 1, 3)?;
    // Before what must be there: one of another kind is told by its name.
    fields.finish()?;
    let check = match (exec, tcp, http) {
        (Some(node), None, None) => Check::Exec(command(&node)?),
        (None, Some(node), None) => {
            let mut fields = node.fields()?;
            let port = fields.require("port", "say which")?;
            let check = Check::Tcp {
                host: host(&mut fields)?,
                port: ports.find(&port)?,
            };
            fields.finish()?;
            check
        }
        (None, None, Some(node)) => get(&node, ports)?,
        _ => return invalid(&path, "must have one of `exec`, `tcpSocket` and `httpGet`"),
    };
    let probe = Probe {
        check,
        initial_delay_s,
        period_s,
        timeout_s,
        successes,
        failures,
    };
    if probe.successes != 1 && !path.ends_with("readinessProbe") {
        return invalid(&format!("{path}.successThreshold"), "must be 1 here");
    }
    Ok(Some(probe))
}

fn get(node: &Node<'_>, ports: &Ports) -> Result<Check, PodError> {
    let mut fields = node.fields()?;
    let port = fields.require("port", "say which")?;
    let path = match fields.get("path") {
        Some(node) => {
            let text = node.text()?;
            let plain = |c: char| c.is_ascii_graphic();
            if !text.starts_with('/') || !text.chars().all(plain) {
                return invalid(&node.path, "must begin with `/`, and have no blanks");
            }
            text.to_owned()
        }
        None => "/".to_owned(),
    };
    if let Some(node) = fields.get("scheme")
        && node.text()? != "HTTP"
    {
        return Err(PodError::Unsupported {
            path: node.path,
            hint: "only HTTP is asked: use `exec` or `tcpSocket` for what speaks TLS".to_owned(),
        });
    }
    let mut headers = Vec::new();
    for node in fields
        .get("httpHeaders")
        .map_or(Ok(Vec::new()), |node| node.list())?
    {
        let mut fields = node.fields()?;
        let name = fields
            .require("name", "a header has one")?
            .text()?
            .to_owned();
        let value = fields
            .require("value", "a header has one")?
            .text()?
            .to_owned();
        fields.finish()?;
        let token = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if name.is_empty() || !name.chars().all(token) || value.chars().any(char::is_control) {
            return invalid(&node.path, "is not a header of HTTP");
        }
        headers.push((name, value));
    }
    let check = Check::Http {
        host: host(&mut fields)?,
        port: ports.find(&port)?,
        path,
        headers,
    };
    fields.finish()?;
    Ok(check)
}

/// `lifecycle`: the command of `preStop`.
pub(super) fn pre_stop(node: Option<Node<'_>>) -> Result<Option<Vec<String>>, PodError> {
    let Some(node) = node else { return Ok(None) };
    let mut fields = node.fields()?;
    let pre_stop = fields.get("preStop");
    fields.finish()?;
    let Some(node) = pre_stop else {
        return Ok(None);
    };
    let mut fields = node.fields()?;
    let exec = fields.require("exec", "a command is all that is run before the end")?;
    let command = command(&exec)?;
    fields.finish()?;
    Ok(Some(command))
}

fn command(node: &Node<'_>) -> Result<Vec<String>, PodError> {
    let mut fields = node.fields()?;
    let command = fields.require("command", "a list of words")?;
    let words = command.texts()?;
    fields.finish()?;
    if words.first().is_none_or(String::is_empty) || words.iter().any(|w| w.contains('\0')) {
        return invalid(
            &command.path,
            "must begin with a program, and have no NUL in it",
        );
    }
    Ok(words)
}

fn host(fields: &mut Fields<'_>) -> Result<Option<IpAddr>, PodError> {
    let Some(node) = fields.get("host") else {
        return Ok(None);
    };
    match node.text()?.parse() {
        Ok(address) => Ok(Some(address)),
        Err(_) => invalid(&node.path, "must be an address: names are not looked up"),
    }
}

fn number16(node: &Node<'_>) -> Result<u16, PodError> {
    let number = node.number(1, u16::MAX.into())?;
    // Between the bounds, it fits.
    Ok(u16::try_from(number).unwrap_or(u16::MAX))
}
