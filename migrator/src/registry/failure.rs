//! What a request to a registry fails with, what to do about it, and whether another try makes sense.

use std::error::Error;
use std::io;
use std::time::{Duration, SystemTime};

use reqwest::header::RETRY_AFTER;
use reqwest::{Response, StatusCode};
use serde::Deserialize;

use super::retry::Failed;

/// Longest answer that is read for the reason it gives, in bytes.
const MAX_REASON: usize = 8 << 10;

/// A name that leads nowhere.
#[derive(Debug, thiserror::Error)]
#[error("the name `{host}` is not known")]
pub(super) struct NoHost {
    pub(super) host: String,
    pub(super) source: io::Error,
}

/// Why a request has no useful answer.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// Its name is not known.
    #[error("there is no host for the registry {host} ({why})")]
    NoHost {
        /// The registry.
        host: String,
        /// What the resolver says.
        why: String,
    },
    /// Nobody answers.
    #[error("the registry {host} cannot be reached")]
    Unreachable {
        /// The registry.
        host: String,
        /// Why.
        source: reqwest::Error,
    },
    /// Its certificate.
    #[error("the certificate of the registry {host} is not trusted ({why})")]
    Untrusted {
        /// The registry.
        host: String,
        /// What is wrong with it.
        why: rustls::Error,
    },
    /// It does not speak TLS.
    #[error("the registry {host} does not speak TLS")]
    NoTls {
        /// The registry.
        host: String,
    },
    /// 401.
    #[error("the registry {host} wants credentials for {what}{}", if *.shown { ", and does not take those that it was shown" } else { "" })]
    Unauthorized {
        /// The registry.
        host: String,
        /// What was asked for.
        what: String,
        /// Whether it was shown any.
        shown: bool,
    },
    /// 403.
    #[error("the registry {host} forbids {what}{reason}")]
    Forbidden {
        /// The registry.
        host: String,
        /// What was asked for.
        what: String,
        /// Its words.
        reason: Reason,
    },
    /// 404.
    #[error("the registry {host} has no {what}{reason}")]
    Missing {
        /// The registry.
        host: String,
        /// What was asked for.
        what: String,
        /// Its words.
        reason: Reason,
    },
    /// 429, or 503.
    #[error("the registry {host} has too much to do{}{reason}", wait(*.after))]
    Busy {
        /// The registry.
        host: String,
        /// When it says to come again.
        after: Option<Duration>,
        /// Its words.
        reason: Reason,
    },
    /// Another status.
    #[error("the registry {host} answers {status} when asked for {what}{reason}")]
    Status {
        /// The registry.
        host: String,
        /// The status.
        status: StatusCode,
        /// What was asked for.
        what: String,
        /// Its words.
        reason: Reason,
    },
    /// The connection broke in an answer.
    #[error("the registry {host} breaks off")]
    Broken {
        /// The registry.
        host: String,
        /// Why.
        source: reqwest::Error,
    },
    /// An answer that ends before its end.
    #[error("the registry {host} ends its answer at byte {came} of {size}")]
    Short {
        /// The registry.
        host: String,
        /// Bytes that are here.
        came: u64,
        /// Bytes that should be.
        size: u64,
    },
    /// An answer that makes no sense.
    #[error("the registry {host} answers what it must not: {what}")]
    Nonsense {
        /// The registry.
        host: String,
        /// What is wrong.
        what: String,
    },
}

/// A registry's words, cut and cleaned; empty if it said nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reason(String);

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() {
            return Ok(());
        }
        write!(f, " (it says: {})", self.0)
    }
}

fn wait(after: Option<Duration>) -> String {
    match after {
        Some(after) => format!(", and says to come again in {} s", after.as_secs()),
        None => String::new(),
    }
}

impl RequestError {
    /// From an error of the client.
    pub(super) fn of_client(host: &str, source: reqwest::Error) -> Self {
        let host = host.to_owned();
        // The message names the host already.
        let source = source.without_url();
        if let Some(error) = found::<NoHost>(&source) {
            let why = error.source.to_string();
            return Self::NoHost { host, why };
        }
        match found::<rustls::Error>(&source) {
            Some(rustls::Error::InvalidMessage(_)) => return Self::NoTls { host },
            Some(why @ rustls::Error::InvalidCertificate(_)) => {
                let why = why.clone();
                return Self::Untrusted { host, why };
            }
            Some(_) | None => {}
        }
        if source.is_redirect() {
            let what = source
                .source()
                .map_or_else(String::new, ToString::to_string);
            return Self::Nonsense { host, what };
        }
        if source.is_body() || source.is_decode() {
            return Self::Broken { host, source };
        }
        Self::Unreachable { host, source }
    }

    /// From an answer that is no success; `what` was asked for, and `shown` says whether credentials were.
    pub(super) async fn of_answer(host: &str, response: Response, what: &str, shown: bool) -> Self {
        let (host, what) = (host.to_owned(), what.to_owned());
        let status = response.status();
        let after = response
            .headers()
            .get(RETRY_AFTER)
            .and_then(|value| retry_after(value.to_str().ok()?, SystemTime::now()));
        let reason = reason(response).await;
        match status {
            StatusCode::UNAUTHORIZED => Self::Unauthorized { host, what, shown },
            StatusCode::FORBIDDEN => Self::Forbidden { host, what, reason },
            StatusCode::NOT_FOUND => Self::Missing { host, what, reason },
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => Self::Busy {
                host,
                after,
                reason,
            },
            _ => Self::Status {
                host,
                status,
                what,
                reason,
            },
        }
    }

    /// What the plan for further tries needs to know; `progress` says whether bytes had come.
    pub(super) fn failed(&self, progress: bool) -> Failed {
        match self {
            Self::Busy { after, .. } => Failed::Asked { after: *after },
            Self::Unreachable { .. } | Self::Broken { .. } | Self::Short { .. } => {
                Failed::Passing { progress }
            }
            Self::Status { status, .. }
                if status.is_server_error() || *status == StatusCode::REQUEST_TIMEOUT =>
            {
                Failed::Passing { progress }
            }
            Self::NoHost { .. }
            | Self::Untrusted { .. }
            | Self::NoTls { .. }
            | Self::Unauthorized { .. }
            | Self::Forbidden { .. }
            | Self::Missing { .. }
            | Self::Status { .. }
            | Self::Nonsense { .. } => Failed::Lasting,
        }
    }

    /// What to do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::NoHost { .. } => {
                Some("is the registry's name right? `REPOSITORY:TAG` alone is on docker.io")
            }
            Self::Untrusted { .. } => Some(
                "name its authority in `registries.ca` of the node's configuration; for a registry without TLS there is \
                 `--plain-http`",
            ),
            Self::NoTls { .. } => Some(
                "if that is meant, use `--plain-http`, or list it in `registries.plain_http` of the node's configuration",
            ),
            Self::Unauthorized { .. } => Some(
                "log in with `skopeo login --authfile FILE HOST`, and name the file by `--creds-file`, or in \
                 `registries.auth_file` of the node's configuration; a registry may also say this of what does not exist",
            ),
            Self::Forbidden { .. } => Some("may these credentials do that in this repository?"),
            Self::Missing { .. } => {
                Some("`skopeo list-tags docker://REPOSITORY` lists what is there")
            }
            Self::Busy { .. } | Self::Broken { .. } | Self::Short { .. } => {
                Some("the same command goes on where this one ended")
            }
            Self::Unreachable { .. } | Self::Status { .. } | Self::Nonsense { .. } => None,
        }
    }
}

/// An error of type `T` among the causes, also one inside an [`io::Error`].
fn found<'a, T: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a T> {
    let mut cause = Some(error);
    while let Some(this) = cause {
        if let Some(found) = this.downcast_ref() {
            return Some(found);
        }
        let inner = this
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref)
            .map(|inner| inner as &(dyn Error + 'static));
        cause = match inner {
            Some(inner) => Some(inner),
            None => this.source(),
        };
    }
    None
}

/// `Retry-After`: seconds, or a date (RFC 9110, 10.2.3).
fn retry_after(text: &str, now: SystemTime) -> Option<Duration> {
    if let Ok(seconds) = text.trim().parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(text.trim()).ok()?;
    Some(date.duration_since(now).unwrap_or(Duration::ZERO))
}

/// The message in a registry's error (distribution-spec, "Error Codes").
async fn reason(response: Response) -> Reason {
    #[derive(Deserialize)]
    struct Body {
        errors: Vec<Item>,
    }
    #[derive(Deserialize)]
    struct Item {
        #[serde(default)]
        message: String,
    }
    let Ok(body) = bounded(response, MAX_REASON).await else {
        return Reason::default();
    };
    let words = serde_json::from_slice::<Body>(&body)
        .ok()
        .and_then(|body| body.errors.into_iter().next())
        .map(|item| item.message)
        .unwrap_or_default();
    Reason(
        words
            .chars()
            .filter(|c| !c.is_control())
            .take(200)
            .collect(),
    )
}

/// Why a body is not read.
#[derive(Debug)]
pub(super) enum BodyError {
    /// It is longer than allowed.
    TooLong,
    /// It breaks off.
    Broken(reqwest::Error),
}

/// Reads a body of at most `limit` bytes.
pub(super) async fn bounded(mut response: Response, limit: usize) -> Result<Vec<u8>, BodyError> {
    let announced = response.content_length().unwrap_or(0);
    if announced > limit as u64 {
        return Err(BodyError::TooLong);
    }
    let mut body = Vec::new();
    while let Some(piece) = response.chunk().await.map_err(BodyError::Broken)? {
        if body.len() + piece.len() > limit {
            return Err(BodyError::TooLong);
        }
        body.extend_from_slice(&piece);
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        let seconds = |text| retry_after(text, now).map(|after| after.as_secs());
        assert_eq!(seconds("120"), Some(120));
        // 784,111,777 is this date (RFC 9110, 5.6.7).
        assert_eq!(seconds("Sun, 06 Nov 1994 08:49:47 GMT"), Some(10));
        assert_eq!(seconds("Sun, 06 Nov 1994 08:49:27 GMT"), Some(0));
        assert_eq!(seconds("soon"), None);
    }

    #[test]
    fn errors_are_found_inside_of_io_errors() {
        let inner = io::Error::other(rustls::Error::DecryptError);
        let outer = io::Error::other(inner);
        assert_eq!(found(&outer), Some(&rustls::Error::DecryptError));
        assert!(found::<NoHost>(&outer).is_none());
    }
}
