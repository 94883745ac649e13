//! The API's client: HTTP/1.1 over the service's Unix socket, one connection a request.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, UPGRADE};
use hyper::upgrade::Upgraded;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio_util::codec::Framed;

use super::error::ApiError;
use super::frames::{ExecCodec, PROTOCOL};
use super::types::{ErrorBody, ExecRequest};

/// How long the service may take to accept a connection.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// Longest JSON answer that is taken, in bytes.
const MAX_ANSWER: usize = 64 << 20;

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nothing listens on the socket.
    #[error("no service answers at {}", socket.display())]
    Unreachable {
        /// The socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The connection broke in the middle.
    #[error("the connection to the service broke")]
    Broken(#[source] hyper::Error),
    /// The service answered with a failure.
    #[error("{0}")]
    Api(ApiError),
    /// The service answered with something else than was expected.
    #[error("the service's answer is not understood: {0}")]
    Answer(String),
}

/// Talks to one service.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// A client of the service at `socket`. Nothing is connected yet.
    pub fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
        }
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    async fn send(&self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, ClientError> {
        let unreachable = |source| ClientError::Unreachable {
            socket: self.socket.clone(),
            source,
        };
        let stream = tokio::time::timeout(CONNECT_DEADLINE, UnixStream::connect(&self.socket))
            .await
            .map_err(|_| unreachable(io::ErrorKind::TimedOut.into()))?
            .map_err(unreachable)?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(ClientError::Broken)?;
        // Drives the connection; ends by itself when the answer was read or dropped.
        tokio::spawn(connection.with_upgrades());
        let response = sender
            .send_request(request)
            .await
            .map_err(ClientError::Broken)?;
        if response.status().is_success() || response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(response);
        }
        let status = response.status();
        let body = collect(response).await?;
        Err(match serde_json::from_slice::<ErrorBody>(&body) {
            Ok(ErrorBody { error }) => ClientError::Api(ApiError(error)),
            Err(_) => ClientError::Answer(format!(
                "{status}: {}",
                String::from_utf8_lossy(body.get(..200).unwrap_or(&body))
            )),
        })
    }

    /// `GET`; the answer is JSON.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        json(
            self.send(request(Method::GET, path, None, Bytes::new())?)
                .await?,
        )
        .await
    }

    /// `POST` of JSON; the answer is JSON.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = to_json(body)?;
        let request = request(Method::POST, path, Some("application/json"), body)?;
        json(self.send(request).await?).await
    }

    /// `POST` of YAML; the answer is JSON.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn post_yaml<T: DeserializeOwned>(
        &self,
        path: &str,
        yaml: String,
    ) -> Result<T, ClientError> {
        let request = request(Method::POST, path, Some("application/yaml"), yaml.into())?;
        json(self.send(request).await?).await
    }

    /// `DELETE`; the answer is JSON.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        json(
            self.send(request(Method::DELETE, path, None, Bytes::new())?)
                .await?,
        )
        .await
    }

    /// `GET`; the answer comes piece by piece.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn stream(&self, path: &str) -> Result<Pieces, ClientError> {
        let response = self
            .send(request(Method::GET, path, None, Bytes::new())?)
            .await?;
        Ok(Pieces {
            body: response.into_body(),
            rest: BytesMut::new(),
        })
    }

    /// `POST` of JSON; the answer comes piece by piece.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn post_stream(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<Pieces, ClientError> {
        let body = to_json(body)?;
        let request = request(Method::POST, path, Some("application/json"), body)?;
        let response = self.send(request).await?;
        Ok(Pieces {
            body: response.into_body(),
            rest: BytesMut::new(),
        })
    }

    /// Starts a command in a container and gives the upgraded stream.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn exec(
        &self,
        pod: &str,
        exec: &ExecRequest,
    ) -> Result<Framed<TokioIo<Upgraded>, ExecCodec>, ClientError> {
        let path = format!("/v1/pods/{}/exec", encode(pod));
        let mut request = request(
            Method::POST,
            &path,
            Some("application/json"),
            to_json(exec)?,
        )?;
        let headers = request.headers_mut();
        headers.insert(
            CONNECTION,
            hyper::header::HeaderValue::from_static("upgrade"),
        );
        headers.insert(UPGRADE, hyper::header::HeaderValue::from_static(PROTOCOL));
        let response = self.send(request).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(ClientError::Answer(
                "it does not offer the exec stream".to_owned(),
            ));
        }
        let upgraded = hyper::upgrade::on(response)
            .await
            .map_err(ClientError::Broken)?;
        Ok(Framed::new(TokioIo::new(upgraded), ExecCodec))
    }
}

/// An answer that comes piece by piece.
#[derive(Debug)]
pub struct Pieces {
    body: Incoming,
    rest: BytesMut,
}

impl Pieces {
    /// The next piece; `None` at the end.
    ///
    /// # Errors
    /// The connection broke.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        loop {
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(error)) => return Err(ClientError::Broken(error)),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }

    /// The next line of an NDJSON answer; `None` at the end.
    ///
    /// # Errors
    /// The connection broke, or the line is not what was expected.
    pub async fn next_json<T: DeserializeOwned>(&mut self) -> Result<Option<T>, ClientError> {
        loop {
            if let Some(end) = self.rest.iter().position(|b| *b == b'\n') {
                let line = self.rest.split_to(end + 1);
                return parse(&line).map(Some);
            }
            if self.rest.len() > MAX_ANSWER {
                return Err(ClientError::Answer("a line without end".to_owned()));
            }
            match self.next().await? {
                Some(data) => self.rest.extend_from_slice(&data),
                None if self.rest.is_empty() => return Ok(None),
                None => {
                    let line = self.rest.split();
                    return parse(&line).map(Some);
                }
            }
        }
    }
}

fn request(
    method: Method,
    path: &str,
    content: Option<&str>,
    body: Bytes,
) -> Result<Request<Full<Bytes>>, ClientError> {
    let mut builder = Request::builder()
        .method(method)
        .uri(path)
        .header(HOST, "migrator");
    if let Some(content) = content {
        builder = builder.header(CONTENT_TYPE, content);
    }
    builder
        .body(Full::new(body))
        .map_err(|error| ClientError::Answer(format!("`{path}` is no request: {error}")))
}

async fn collect(response: Response<Incoming>) -> Result<Bytes, ClientError> {
    let mut body = response.into_body();
    let mut all = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(ClientError::Broken)?;
        if let Ok(data) = frame.into_data() {
            if all.len() + data.len() > MAX_ANSWER {
                return Err(ClientError::Answer("it is too long".to_owned()));
            }
            all.extend_from_slice(&data);
        }
    }
    Ok(all.freeze())
}

async fn json<T: DeserializeOwned>(response: Response<Incoming>) -> Result<T, ClientError> {
    parse(&collect(response).await?)
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ClientError> {
    serde_json::from_slice(body).map_err(|error| ClientError::Answer(error.to_string()))
}

fn to_json(body: &impl Serialize) -> Result<Bytes, ClientError> {
    serde_json::to_vec(body)
        .map(Bytes::from)
        .map_err(|error| ClientError::Answer(format!("the request is no JSON: {error}")))
}

/// `text` as one segment of a path or one value of a query: everything but RFC 3986's unreserved characters is
/// percent-encoded.
pub fn encode(text: &str) -> String {
    use std::fmt::Write as _;
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a string has no way to fail.
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_encoded_as_one_segment() {
        assert_eq!(encode("web-1"), "web-1");
        assert_eq!(encode("a/b:1 ä"), "a%2Fb%3A1%20%C3%A4");
    }

    #[tokio::test]
    async fn a_socket_that_nobody_listens_on_is_unreachable() {
        let client = Client::new(Path::new("/nonexistent/api.sock"));
        let error = client.get::<serde_json::Value>("/v1/health").await;
        assert!(matches!(error, Err(ClientError::Unreachable { .. })));
    }
}
