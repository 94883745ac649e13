//! A token server as docker's token authentication has it. The registry that trusts it is a real one.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use rcgen::{Certificate, CertificateParams, KeyPair, SigningKey};
use serde_json::json;

pub(super) const SERVICE: &str = "lab-registry";
pub(super) const ISSUER: &str = "lab-issuer";

/// The server. It ends with its guard.
pub struct TokenServer {
    realm: String,
    certificate: Certificate,
    shared: Arc<Shared>,
    listening: Option<JoinHandle<()>>,
}

struct Shared {
    key: KeyPair,
    x5c: String,
    /// What it takes: `USER:PASSWORD`, or an identity token.
    accepts: String,
    /// Seconds from now for which tokens are good; negative: they are over.
    good_for: i64,
    given: AtomicU64,
    over: AtomicBool,
}

impl TokenServer {
    /// A server that gives tokens, good for some seconds, to whoever shows `accepts`: `USER:PASSWORD`, or an identity token.
    ///
    /// # Errors
    /// No port is free.
    pub fn start(accepts: &str, good_for: i64) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let realm = format!("http://{}/token", listener.local_addr()?);
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new(vec![ISSUER.to_owned()])?.self_signed(&key)?;
        let shared = Arc::new(Shared {
            x5c: STANDARD.encode(certificate.der()),
            key,
            accepts: accepts.to_owned(),
            good_for,
            given: AtomicU64::new(0),
            over: AtomicBool::new(false),
        });
        let own = Arc::clone(&shared);
        let listening = std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if own.over.load(Ordering::SeqCst) {
                    return;
                }
                // A client that goes away in the middle is its own affair.
                let _ = own.answer(client);
            }
        });
        Ok(Self {
            realm,
            certificate,
            shared,
            listening: Some(listening),
        })
    }

    /// Where it is.
    pub fn realm(&self) -> &str {
        &self.realm
    }

    /// Tokens that it gave.
    pub fn given(&self) -> u64 {
        self.shared.given.load(Ordering::SeqCst)
    }

    pub(super) fn certificate(&self) -> String {
        self.certificate.pem()
    }
}

impl Drop for TokenServer {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
        let address = self.realm.trim_start_matches("http://");
        // Wakes the listener.
        let _ = TcpStream::connect(address.trim_end_matches("/token"));
        if let Some(listening) = self.listening.take() {
            let _ = listening.join();
        }
    }
}

impl Shared {
    fn answer(&self, client: TcpStream) -> Result<()> {
        let mut reader = BufReader::new(client.try_clone()?);
        let (mut head, mut line) = (Vec::new(), String::new());
        while reader.read_line(&mut line)? > 2 {
            head.push(std::mem::take(&mut line));
        }
        let first = head.first().context("no request")?;
        let header = |name: &str| {
            head.iter().find_map(|line| {
                let (found, value) = line.split_once(':')?;
                found.eq_ignore_ascii_case(name).then(|| value.trim())
            })
        };
        let length: usize = header("content-length").unwrap_or("0").parse()?;
        ensure!(length < 1 << 16, "too long");
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        let body = String::from_utf8_lossy(&body).into_owned();
        let basic = header("authorization").and_then(|value| value.strip_prefix("Basic "));
        let shown = match basic {
            Some(encoded) => String::from_utf8_lossy(&STANDARD.decode(encoded)?).into_owned(),
            None => parameter(&body, "refresh_token").unwrap_or_default(),
        };
        let query = match first.split_once('?') {
            Some((_, query)) => query.split(' ').next().unwrap_or_default(),
            None => &body,
        };
        let scope = parameter(query, "scope").unwrap_or_default();
        let (status, text) = if shown == self.accepts {
            self.given.fetch_add(1, Ordering::SeqCst);
            (
                "200 OK",
                json!({ "token": self.token(&scope)? }).to_string(),
            )
        } else {
            ("401 Unauthorized", String::new())
        };
        let length = text.len();
        let mut client = client;
        write!(
            client,
            "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{text}"
        )?;
        Ok(())
    }

    /// A JSON web token (RFC 7519) with ES256, as distribution's "Token Authentication Implementation" has it.
    fn token(&self, scope: &str) -> Result<String> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let mut parts = scope.split(':');
        let access = match (parts.next(), parts.next(), parts.next()) {
            (Some(kind), Some(name), Some(actions)) => {
                let actions: Vec<&str> = actions.split(',').collect();
                json!([{ "type": kind, "name": name, "actions": actions }])
            }
            _ => json!([]),
        };
        let head = json!({ "typ": "JWT", "alg": "ES256", "x5c": [self.x5c] });
        let claims = json!({
            "iss": ISSUER, "sub": "lab", "aud": SERVICE, "jti": now.to_string(),
            "iat": now, "nbf": now - 5, "exp": i64::try_from(now)? + self.good_for,
            "access": access,
        });
        let encode = |text: String| URL_SAFE_NO_PAD.encode(text);
        let signed = format!(
            "{}.{}",
            encode(head.to_string()),
            encode(claims.to_string())
        );
        let signature = raw_signature(&self.key.sign(signed.as_bytes())?)?;
        Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
    }
}

/// From DER, two INTEGERs in a SEQUENCE (RFC 3279, 2.2.3), to the two numbers of 32 bytes that RFC 7518, 3.4 wants.
fn raw_signature(der: &[u8]) -> Result<Vec<u8>> {
    let mut rest = der.get(2..).context("no signature")?;
    let mut raw = Vec::with_capacity(64);
    for _ in 0..2 {
        let length = usize::from(*rest.get(1).context("no number")?);
        let number = rest.get(2..2 + length).context("a short number")?;
        rest = &rest[2 + length..];
        let start = number.iter().position(|byte| *byte != 0).unwrap_or(length);
        let number = &number[start..];
        ensure!(number.len() <= 32, "a long number");
        raw.resize(raw.len() + 32 - number.len(), 0);
        raw.extend_from_slice(number);
    }
    Ok(raw)
}

/// A parameter of a query or a form, decoded.
fn parameter(text: &str, name: &str) -> Option<String> {
    let value = text.split('&').find_map(|pair| {
        let (found, value) = pair.split_once('=')?;
        (found == name).then_some(value)
    })?;
    let mut bytes = Vec::new();
    let mut rest = value.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let hex = [rest.next()?, rest.next()?];
                u8::from_str_radix(std::str::from_utf8(&hex).ok()?, 16).ok()?
            }
            b'+' => b' ',
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}
