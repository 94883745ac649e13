//! `GET /v1/pods/NAME/logs`.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::stream;
use serde::Deserialize;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::error::ApiError;
use super::types::{ErrorCode, LogLine, PodState};
use crate::daemon::node::Node;
use crate::pods::View;
use crate::pods::logs::{Cursor, Entry, LogStore, StreamKey};

/// Bytes of log that are read at a time.
const BUDGET: u64 = 256 << 10;

/// Longest line that is put together before its beginning is sent.
const MAX_LINE: usize = 64 << 10;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LogsQuery {
    #[serde(default)]
    follow: bool,
    container: Option<String>,
    tail: Option<usize>,
    #[serde(default)]
    format: Format,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Format {
    #[default]
    Text,
    Ndjson,
}

pub(super) async fn logs(
    State(node): State<Arc<Node>>,
    Path(name): Path<String>,
    Query(query): Query<LogsQuery>,
) -> Result<Response, ApiError> {
    let pod = node.pods.get(&name)?;
    if let Some(container) = &query.container {
        pod.check_container(container)?;
    }
    let prefix = query.container.is_none() && pod.spec().containers.len() > 1;
    let content = match query.format {
        Format::Text => "text/plain; charset=utf-8",
        Format::Ndjson => "application/x-ndjson",
    };
    let log = pod.logs();
    let mut reader = Reader {
        more: log.watch(),
        at: log.start(),
        log,
        filter: query.container,
        format: match (query.format, prefix) {
            (Format::Ndjson, _) => Formatter::Ndjson,
            (Format::Text, false) => Formatter::Raw,
            (Format::Text, true) => Formatter::Prefixed(BTreeMap::new()),
        },
    };
    let mut first = VecDeque::new();
    if let Some(lines) = query.tail {
        first.push_back(tail(reader.drain().await?, lines));
    }
    let follower = Follower {
        reader,
        first,
        pod: query.follow.then(|| pod.watch()),
        shutdown: node.shutdown.clone(),
        over: false,
    };
    let body = Body::from_stream(stream::unfold(follower, |mut follower| async {
        let next = follower.next().await.transpose()?;
        Some((next, follower))
    }));
    Ok(([(CONTENT_TYPE, content)], body).into_response())
}

/// The last `lines` lines of a text.
fn tail(text: Vec<u8>, lines: usize) -> Bytes {
    let body = text.strip_suffix(b"\n").unwrap_or(&text);
    let ends = body.iter().enumerate().rev().filter(|(_, b)| **b == b'\n');
    let start = match lines {
        0 => text.len(),
        _ => ends.map(|(at, _)| at + 1).nth(lines - 1).unwrap_or(0),
    };
    Bytes::from(text).slice(start..)
}

struct Reader {
    log: Arc<LogStore>,
    more: watch::Receiver<u64>,
    at: Cursor,
    filter: Option<String>,
    format: Formatter,
}

impl Reader {
    /// The next formatted piece; `None` at the present end.
    async fn piece(&mut self) -> Result<Option<Vec<u8>>, ApiError> {
        loop {
            self.more.mark_unchanged();
            let (log, at) = (Arc::clone(&self.log), self.at);
            let read = tokio::task::spawn_blocking(move || log.read(at, BUDGET))
                .await
                .map_err(|e| ApiError::caused(ErrorCode::Internal, &e))?;
            let (entries, next) = read.map_err(|e| ApiError::caused(ErrorCode::Internal, &e))?;
            if next == self.at {
                return Ok(None);
            }
            self.at = next;
            let mut out = Vec::new();
            for entry in entries {
                if self
                    .filter
                    .as_ref()
                    .is_none_or(|only| *only == entry.key.container)
                {
                    self.format.add(entry, &mut out);
                }
            }
            if !out.is_empty() {
                return Ok(Some(out));
            }
        }
    }

    /// Everything up to now.
    async fn drain(&mut self) -> Result<Vec<u8>, ApiError> {
        let mut all = Vec::new();
        while let Some(piece) = self.piece().await? {
            all.extend(piece);
        }
        Ok(all)
    }
}

struct Follower {
    reader: Reader,
    first: VecDeque<Bytes>,
    /// Present when new output is waited for.
    pod: Option<watch::Receiver<View>>,
    shutdown: CancellationToken,
    over: bool,
}

impl Follower {
    async fn next(&mut self) -> Result<Option<Bytes>, ApiError> {
        if let Some(first) = self.first.pop_front() {
            return Ok(Some(first));
        }
        loop {
            if let Some(piece) = self.reader.piece().await? {
                return Ok(Some(piece.into()));
            }
            let Some(pod) = self.pod.as_mut().filter(|_| !self.over) else {
                // What has no line's end yet will get none.
                let mut rest = Vec::new();
                self.reader.format.finish(&mut rest);
                return Ok((!rest.is_empty()).then(|| rest.into()));
            };
            let gone = |view: &View| view.state == PodState::Failed;
            tokio::select! {
                changed = self.reader.more.changed() => self.over = changed.is_err(),
                left = pod.wait_for(gone) => {
                    drop(left);
                    self.over = true;
                }
                () = self.shutdown.cancelled() => self.over = true,
            }
        }
    }
}

enum Formatter {
    /// The bytes as they are.
    Raw,
    /// Whole lines, each with its container's name. The map has the beginnings of lines.
    Prefixed(BTreeMap<StreamKey, Vec<u8>>),
    /// A JSON object a piece.
    Ndjson,
}

impl Formatter {
    fn add(&mut self, entry: Entry, out: &mut Vec<u8>) {
        match self {
            Self::Raw => out.extend(entry.data),
            Self::Prefixed(partial) => {
                let rest = partial.entry(entry.key.clone()).or_default();
                for piece in entry.data.split_inclusive(|b| *b == b'\n') {
                    rest.extend_from_slice(piece);
                    if piece.ends_with(b"\n") || rest.len() >= MAX_LINE {
                        prefixed(&entry.key, rest, out);
                        rest.clear();
                    }
                }
            }
            Self::Ndjson => {
                let line = LogLine {
                    container: entry.key.container,
                    stream: entry.key.stream,
                    offset: entry.offset,
                    unix_ms: entry.unix_ms,
                    text: String::from_utf8_lossy(&entry.data).into_owned(),
                };
                // Strings and numbers have no way to fail.
                if let Ok(json) = serde_json::to_vec(&line) {
                    out.extend(json);
                    out.push(b'\n');
                }
            }
        }
    }

    fn finish(&mut self, out: &mut Vec<u8>) {
        match self {
            Self::Raw | Self::Ndjson => {}
            Self::Prefixed(partial) => {
                for (key, rest) in std::mem::take(partial) {
                    if !rest.is_empty() {
                        prefixed(&key, &rest, out);
                    }
                }
            }
        }
    }
}

fn prefixed(key: &StreamKey, line: &[u8], out: &mut Vec<u8>) {
    out.push(b'[');
    out.extend_from_slice(key.container.as_bytes());
    out.extend_from_slice(b"] ");
    out.extend_from_slice(line);
    if !line.ends_with(b"\n") {
        out.push(b'\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::logs::LogStream;

    #[test]
    fn a_tail_has_whole_lines() {
        let text = b"one\ntwo\nthree\n".to_vec();
        assert_eq!(&tail(text.clone(), 2)[..], b"two\nthree\n");
        assert_eq!(&tail(text.clone(), 9)[..], b"one\ntwo\nthree\n");
        assert_eq!(&tail(text, 0)[..], b"");
        assert_eq!(&tail(b"one\npart".to_vec(), 1)[..], b"part");
    }

    #[test]
    fn lines_of_several_containers_are_not_mixed() {
        let mut format = Formatter::Prefixed(BTreeMap::new());
        let mut out = Vec::new();
        let entry = |container: &str, data: &str| Entry {
            key: StreamKey {
                container: container.to_owned(),
                stream: LogStream::Stdout,
            },
            offset: 0,
            unix_ms: 0,
            data: data.into(),
        };
        format.add(entry("a", "hel"), &mut out);
        format.add(entry("b", "x\ny"), &mut out);
        format.add(entry("a", "lo\n"), &mut out);
        format.finish(&mut out);
        assert_eq!(String::from_utf8(out).unwrap(), "[b] x\n[a] hello\n[b] y\n");
    }
}
