//! Requests to one repository of one host, with what it wants to be shown.
//!
//! ```text
//! GET v2/..        -> 401, WWW-Authenticate: Basic            -> the same, with user and password
//!                  -> 401, WWW-Authenticate: Bearer realm=..  -> GET realm (token) -> the same, with the token
//! ```
//!
//! Credentials go to the host that they are for, and to the token server that it names, by TLS unless the host itself is
//! spoken to without.

use reqwest::header::{AUTHORIZATION, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode, Url};
use serde::Deserialize;
use tokio::sync::Mutex;

use super::challenge::{self, Challenge};
use super::credentials::Credentials;
use super::endpoint::Endpoint;
use super::failure::{BodyError, RequestError, bounded};

/// Longest answer of a token server, in bytes. Tokens of a few KiB are usual.
const MAX_TOKEN: usize = 256 << 10;

/// What is done with the repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Images are fetched.
    Pull,
    /// And stored.
    Push,
}

/// One repository of one host.
#[derive(Debug)]
pub(super) struct Session {
    http: Client,
    endpoint: Endpoint,
    repository: String,
    access: Access,
    credentials: Credentials,
    /// What requests carry at present.
    shown: Mutex<Shown>,
}

#[derive(Clone, Debug, Default)]
struct Shown {
    header: Option<HeaderValue>,
    /// Counts the headers, so that of several requests that fail at a time one gets a new token.
    version: u32,
}

impl Session {
    pub(super) fn new(
        http: Client,
        endpoint: Endpoint,
        repository: &str,
        access: Access,
        credentials: Credentials,
    ) -> Self {
        Self {
            http,
            endpoint,
            repository: repository.to_owned(),
            access,
            credentials,
            shown: Mutex::default(),
        }
    }

    /// The host's name, for messages.
    pub(super) fn host(&self) -> &str {
        &self.endpoint.name
    }

    /// The URL of `path` in the repository.
    pub(super) fn url(&self, path: &str) -> Result<Url, RequestError> {
        self.endpoint
            .url(&format!("{}/{path}", self.repository))
            .ok_or_else(|| self.nonsense(format!("`{path}` is no path")))
    }

    /// The URL that the host answers with, which may be relative to the one asked.
    pub(super) fn location(&self, asked: &Url, location: &str) -> Result<Url, RequestError> {
        asked
            .join(location)
            .map_err(|_| self.nonsense(format!("its location `{location}` is no URL")))
    }

    pub(super) fn nonsense(&self, what: impl Into<String>) -> RequestError {
        RequestError::Nonsense {
            host: self.host().to_owned(),
            what: what.into(),
        }
    }

    /// Sends a request; `dress` adds headers to it. An answer of any status but 401 is returned as it is.
    ///
    /// `what` names the thing that is asked for, for messages.
    pub(super) async fn send(
        &self,
        method: Method,
        url: &Url,
        what: &str,
        dress: impl Fn(RequestBuilder) -> RequestBuilder,
    ) -> Result<Response, RequestError> {
        let mut renewed = false;
        loop {
            let shown = self.shown.lock().await.clone();
            let request = dress(self.http.request(method.clone(), url.clone()));
            let response = self.deliver(request, url, &shown).await?;
            if response.status() != StatusCode::UNAUTHORIZED || !self.endpoint.owns(response.url())
            {
                return Ok(response);
            }
            let headers = response.headers().get_all(WWW_AUTHENTICATE).iter();
            let challenge = challenge::choose(headers.filter_map(|value| value.to_str().ok()));
            let refused = (renewed || !self.may_try(challenge.as_ref(), &shown))
                .then(|| shown.header.is_some() || self.credentials.are_there());
            match (refused, challenge) {
                (None, Some(challenge)) => {
                    renewed = true;
                    self.renew(&challenge, shown.version, what).await?;
                }
                (Some(shown), _) => {
                    return Err(RequestError::of_answer(self.host(), response, what, shown).await);
                }
                (None, None) => {
                    return Err(RequestError::of_answer(self.host(), response, what, false).await);
                }
            }
        }
    }

    /// Sends a request whose body cannot be sent twice, with what the last one carried.
    pub(super) async fn send_once(
        &self,
        method: Method,
        url: &Url,
        dress: impl FnOnce(RequestBuilder) -> RequestBuilder,
    ) -> Result<Response, RequestError> {
        let shown = self.shown.lock().await.clone();
        let request = dress(self.http.request(method, url.clone()));
        self.deliver(request, url, &shown).await
    }

    /// Gives a response of success; else the error that it is.
    pub(super) async fn check(
        &self,
        response: Response,
        what: &str,
    ) -> Result<Response, RequestError> {
        if response.status().is_success() {
            return Ok(response);
        }
        let shown = self.credentials.are_there();
        Err(RequestError::of_answer(self.host(), response, what, shown).await)
    }

    /// Reads a body of at most `limit` bytes.
    pub(super) async fn body(
        &self,
        response: Response,
        limit: usize,
        what: &str,
    ) -> Result<Vec<u8>, RequestError> {
        bounded(response, limit).await.map_err(|error| match error {
            BodyError::TooLong => self.nonsense(format!("{what} has more than {limit} bytes")),
            BodyError::Broken(source) => RequestError::of_client(self.host(), source),
        })
    }

    async fn deliver(
        &self,
        mut request: RequestBuilder,
        url: &Url,
        shown: &Shown,
    ) -> Result<Response, RequestError> {
        if let Some(header) = &shown.header
            && self.endpoint.owns(url)
        {
            request = request.header(AUTHORIZATION, header.clone());
        }
        request
            .send()
            .await
            .map_err(|error| RequestError::of_client(self.host(), error))
    }

    /// Whether there is something that was not shown yet. A token may have expired; a password does not.
    fn may_try(&self, challenge: Option<&Challenge>, shown: &Shown) -> bool {
        match (challenge, &self.credentials) {
            (None, _) => false,
            (Some(_), Credentials::Bearer(_))
            | (Some(Challenge::Basic), Credentials::Basic { .. }) => shown.header.is_none(),
            (Some(Challenge::Basic), Credentials::Anonymous | Credentials::Identity(_)) => false,
            (Some(Challenge::Bearer { .. }), _) => true,
        }
    }

    /// Gets what the challenge asks for, unless another request did since `version`.
    async fn renew(
        &self,
        challenge: &Challenge,
        version: u32,
        what: &str,
    ) -> Result<(), RequestError> {
        let mut shown = self.shown.lock().await;
        if shown.version != version {
            return Ok(());
        }
        let header = match (challenge, &self.credentials) {
            (_, Credentials::Bearer(token)) => bearer(token.expose()),
            (Challenge::Basic, Credentials::Basic { user, password }) => {
                basic(user, password.expose())
            }
            (Challenge::Basic, Credentials::Anonymous | Credentials::Identity(_)) => None,
            (
                Challenge::Bearer {
                    realm,
                    service,
                    scope,
                },
                Credentials::Anonymous | Credentials::Basic { .. } | Credentials::Identity(_),
            ) => {
                let token = self
                    .token(realm, service.as_deref(), scope.as_deref(), what)
                    .await?;
                bearer(&token)
            }
        };
        let mut header =
            header.ok_or_else(|| self.nonsense("a token or password that no header can carry"))?;
        header.set_sensitive(true);
        *shown = Shown {
            header: Some(header),
            version: version.wrapping_add(1),
        };
        Ok(())
    }

    /// Asks the token server (distribution's "Token Authentication Specification", and its OAuth2 variant).
    async fn token(
        &self,
        realm: &str,
        service: Option<&str>,
        scope: Option<&str>,
        what: &str,
    ) -> Result<String, RequestError> {
        let url = Url::parse(realm)
            .ok()
            .filter(|url| url.scheme() == "https" || !self.endpoint.has_tls())
            .ok_or_else(|| self.nonsense(format!("its token server is at `{realm}`")))?;
        let host = url.host_str().unwrap_or_default().to_owned();
        let actions = match self.access {
            Access::Pull => "pull",
            Access::Push => "pull,push",
        };
        let own = format!("repository:{}:{actions}", self.repository);
        let mut form = vec![("scope", scope.unwrap_or(&own))];
        form.extend(service.map(|service| ("service", service)));
        let request = match &self.credentials {
            Credentials::Identity(token) => {
                form.extend([
                    ("grant_type", "refresh_token"),
                    ("client_id", "migrator"),
                    ("refresh_token", token.expose()),
                ]);
                self.http.post(url).form(&form)
            }
            Credentials::Basic { user, password } => self
                .http
                .get(url)
                .query(&form)
                .basic_auth(user, Some(password.expose())),
            Credentials::Anonymous | Credentials::Bearer(_) => self.http.get(url).query(&form),
        };
        let sent = request.send().await;
        let response = sent.map_err(|error| RequestError::of_client(&host, error))?;
        if !response.status().is_success() {
            let shown = self.credentials.are_there();
            return Err(RequestError::of_answer(&host, response, what, shown).await);
        }
        #[derive(Deserialize)]
        struct Answer {
            token: Option<String>,
            access_token: Option<String>,
        }
        let body = self.body(response, MAX_TOKEN, "a token").await?;
        // Not the parser's message: it may show a part of the token.
        let nonsense = || self.nonsense("its token server gives no token");
        let answer: Answer = serde_json::from_slice(&body).map_err(|_| nonsense())?;
        answer.token.or(answer.access_token).ok_or_else(nonsense)
    }
}

fn bearer(token: &str) -> Option<HeaderValue> {
    HeaderValue::from_str(&format!("Bearer {token}")).ok()
}

fn basic(user: &str, password: &str) -> Option<HeaderValue> {
    use base64::Engine as _;
    let both = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
    HeaderValue::from_str(&format!("Basic {both}")).ok()
}
