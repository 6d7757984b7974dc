//! From a hub's address to an open WebSocket: name, TCP, TLS with roots or pin, upgrade.

use std::{
    fmt, io,
    net::IpAddr,
    pin::Pin,
    str::FromStr,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use bytes::Bytes;
use connect_crypto::invite::HubAddress;
use http::{HeaderMap, HeaderValue, StatusCode, Uri, header, uri::Scheme};
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::TlsConnector;
use tokio_tungstenite::{
    WebSocketStream, client_async_with_config,
    tungstenite::{self, client::IntoClientRequest, protocol::WebSocketConfig},
};

use super::{
    sockets::{CuttableTcp, Sockets},
    tls::{HubCa, Verification},
};
use crate::error::{Error, ErrorKind, Result};

/// TCP, TLS and the upgrade together must be done within this time.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// A hub as an agent dials it: a checked URL, and what its certificate must be.
#[derive(Debug, Clone)]
pub(crate) struct HubUrl {
    /// Plain text if none, which is for loopback.
    tls: Option<Verification>,
    host: String,
    port: u16,
    sockets: Sockets,
}

/// What a look at a hub found.
#[derive(Debug)]
pub(crate) struct Look {
    /// By what its certificate was verified, in words.
    pub(crate) verified_by: &'static str,
    /// How long it took, from TCP to the end of the answer.
    pub(crate) took: Duration,
    /// Its `Date` header.
    pub(crate) date: Option<String>,
}

/// Bytes that are read of the answer to a look.
const MAX_LOOK: u64 = 16 * 1024;

/// A WebSocket to the hub, whatever is under it.
pub(crate) type HubSocket = WebSocketStream<Upgrading>;

/// A byte stream that a WebSocket can run on.
pub(crate) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

impl fmt::Display for HubUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", if self.tls.is_some() { "https" } else { "http" }, self.authority())
    }
}

impl HubUrl {
    /// Checks a hub's address: a scheme that is one of ours, a host, no path, and no plain text
    /// off loopback. Its certificate is the pinned one, or verified by `ca`, else by the system's
    /// authorities.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`], saying what is wrong with it.
    pub(crate) fn parse(address: &HubAddress, ca: Option<&HubCa>) -> Result<Self> {
        let usage = |message: &str| {
            Error::new(ErrorKind::Usage, format_args!("the hub `{}` {message}", address.url))
                .hint("a hub looks like `https://hub.example.com` or `http://127.0.0.1:7420`")
        };
        let uri = Uri::from_str(&address.url).map_err(|_| usage("is not a URL"))?;
        let tls = match uri.scheme().map(Scheme::as_str) {
            Some("https" | "wss") => true,
            Some("http" | "ws") => false,
            Some(_) | None => return Err(usage("has no scheme `https://` or `http://`")),
        };
        let authority = uri.authority().ok_or_else(|| usage("names no host"))?;
        if authority.as_str().contains('@') || uri.host().is_none_or(str::is_empty) {
            return Err(usage("must be only a host, with a port if needed"));
        }
        if uri.path() != "/" && !uri.path().is_empty() || uri.query().is_some() {
            return Err(usage("must not have a path"));
        }
        let host = authority.host().to_ascii_lowercase();
        let loopback = is_loopback(&host);
        if !tls && !loopback && !insecure_allowed() {
            return Err(usage("speaks plain text, and is not on this machine").hint(
                "use `https://`; the hub makes its own certificate when it is given none. \
                 CONNECT_ALLOW_INSECURE=true shows metadata (never data) to the network",
            ));
        }
        if !tls && address.pin.is_some() {
            return Err(usage("has a certificate pin but speaks plain text"));
        }
        let port = authority.port_u16().unwrap_or(if tls { 443 } else { 80 });
        let verification = match (address.pin, ca) {
            (Some(_), Some(_)) => {
                return Err(usage("has a certificate pin, which needs no authority")
                    .hint("leave out `--ca`, or the part of the address after `#`"));
            }
            (None, Some(_)) if !tls => {
                return Err(usage("speaks plain text, so it shows no certificate")
                    .hint("leave out `--ca`, or use `https://`"));
            }
            (Some(pin), None) => Verification::Pin(pin),
            (None, Some(ca)) => Verification::Authorities(ca.clone()),
            (None, None) => Verification::System,
        };
        let tls = tls.then_some(verification);
        Ok(Self { tls, host, port, sockets: Sockets::new() })
    }

    /// Host and port as dialled: what the login signs.
    pub(crate) fn authority(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    /// The sockets that were opened by this value or a clone of it.
    pub(crate) fn sockets(&self) -> &Sockets {
        &self.sockets
    }

    /// Opens a WebSocket on `path` and gives back the stream under it, with what the hub said after its
    /// answer: for whoever reads and writes frames himself.
    ///
    /// # Errors
    /// As [`HubUrl::open`].
    pub(crate) async fn open_stream(
        &self,
        path: &str,
        headers: &[(http::HeaderName, HeaderValue)],
    ) -> Result<(Box<dyn Io>, Bytes)> {
        let upgraded = self.open(path, headers, WebSocketConfig::default()).await?.into_inner();
        Ok((upgraded.io, upgraded.early))
    }

    /// Opens a WebSocket on `path`.
    ///
    /// # Errors
    /// [`ErrorKind::HubUnreachable`] when something on the way fails or is not a hub;
    /// [`ErrorKind::TrustViolation`] when the certificate is not the pinned one.
    pub(crate) async fn open(
        &self,
        path: &str,
        headers: &[(http::HeaderName, HeaderValue)],
        config: WebSocketConfig,
    ) -> Result<HubSocket> {
        let mut cuts = self.sockets.cuts();
        tokio::select! {
            opened = timeout(DIAL_TIMEOUT, self.open_unbounded(path, headers, config)) => {
                opened.unwrap_or_else(|_| {
                    Err(self
                        .unreachable("no answer in 10 s")
                        .hint("is the address right, and the hub up?"))
                })
            }
            // The sender lives as long as this value.
            _ = cuts.changed() => Err(self.unreachable("the machine slept, or its network changed")),
        }
    }

    /// Asks the hub whether it is well, as a load balancer would: over TCP and TLS as an agent uses them.
    ///
    /// # Errors
    /// As [`HubUrl::open`].
    pub(crate) async fn look(&self) -> Result<Look> {
        let look = async {
            let begun = Instant::now();
            let mut io = self.connect().await?;
            let request = format!(
                "GET /healthz HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n",
                self.authority()
            );
            io.write_all(request.as_bytes()).await.map_err(|error| self.unreachable(error))?;
            let mut answer = Vec::new();
            let reading = (&mut io).take(MAX_LOOK).read_to_end(&mut answer).await;
            let text = String::from_utf8_lossy(&answer);
            if !text.starts_with("HTTP/1.") {
                let error = match reading {
                    Err(error) => self.unreachable(error),
                    Ok(_) => {
                        self.unreachable("something answers there, but it does not speak HTTP")
                    }
                };
                return Err(error.hint("is this a Private Connect ZK hub?"));
            }
            let date = text.lines().take_while(|line| !line.is_empty()).find_map(|line| {
                let (name, value) = line.split_once(':')?;
                name.eq_ignore_ascii_case("date").then(|| value.trim().to_owned())
            });
            let verified_by = match &self.tls {
                Some(Verification::Pin(_)) => "its certificate is the pinned one",
                Some(Verification::Authorities(_)) => {
                    "its certificate is by the authority of `--ca`"
                }
                Some(Verification::System) => "its certificate is by an authority of the system",
                None => "on this machine, without TLS",
            };
            Ok(Look { verified_by, took: begun.elapsed(), date })
        };
        timeout(DIAL_TIMEOUT, look).await.unwrap_or_else(|_| {
            Err(self.unreachable("no answer in 10 s").hint("is the address right, and the hub up?"))
        })
    }

    async fn open_unbounded(
        &self,
        path: &str,
        headers: &[(http::HeaderName, HeaderValue)],
        config: WebSocketConfig,
    ) -> Result<HubSocket> {
        let io = self.connect().await?;
        let scheme = if self.tls.is_some() { "wss" } else { "ws" };
        let mut request = format!("{scheme}://{}{path}", self.authority())
            .into_client_request()
            .map_err(|error| self.unreachable(error))?;
        for (name, value) in headers {
            request.headers_mut().insert(name.clone(), value.clone());
        }
        let upgraded = client_async_with_config(request, Upgrading::new(io), Some(config)).await;
        let (socket, _) = upgraded.map_err(|error| {
            if let tungstenite::Error::Http(response) = &error {
                if response.status() == StatusCode::TOO_MANY_REQUESTS {
                    return self.too_many(response.headers());
                }
                return self
                    .unreachable(format_args!("it answers HTTP {}", response.status()))
                    .hint("is this a Private Connect ZK hub?");
            }
            self.unreachable(error).hint("something answers there, but it does not speak WebSocket")
        })?;
        Ok(socket)
    }

    /// TCP, and TLS where the hub has it.
    async fn connect(&self) -> Result<Box<dyn Io>> {
        let host = self.host.trim_start_matches('[').trim_end_matches(']');
        let tcp = TcpStream::connect((host, self.port)).await.map_err(|error| {
            self.unreachable(error)
                .hint("is the address right, and is `connect-hub serve` running there?")
        })?;
        tcp.set_nodelay(true).map_err(|error| self.unreachable(error))?;
        let tcp = self.sockets.add(tcp).map_err(|error| self.unreachable(error))?;
        Ok(match &self.tls {
            Some(verification) => Box::new(self.tls(verification, host, tcp).await?),
            None => Box::new(tcp),
        })
    }

    async fn tls(
        &self,
        verification: &Verification,
        host: &str,
        tcp: CuttableTcp,
    ) -> Result<tokio_rustls::client::TlsStream<CuttableTcp>> {
        let name =
            ServerName::try_from(host.to_owned()).map_err(|error| self.unreachable(error))?;
        let config = verification.client_config().map_err(|error| self.unreachable(error))?;
        let connected = TlsConnector::from(config).connect(name, tcp).await;
        connected.map_err(|error| verification.explain(self, &error))
    }

    /// The hub, or a proxy before it, has too much to do with this address.
    fn too_many(&self, headers: &HeaderMap) -> Error {
        let retry_after = headers.get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
        let mut error = self
            .unreachable("too many connections, or failed tries, from this address")
            .hint("the agent comes back by itself; a command can be tried again in a minute");
        error.retry_in = retry_after.and_then(|secs| secs.parse().ok()).map(Duration::from_secs);
        error.busy = true;
        error
    }

    fn unreachable(&self, cause: impl fmt::Display) -> Error {
        Error::new(ErrorKind::HubUnreachable, format_args!("cannot reach the hub {self}: {cause}"))
    }
}

/// A stream that is being upgraded to a WebSocket: until the end of the hub's answer it hands out no
/// byte beyond it, so that nothing is lost if the stream is then taken out of the WebSocket.
pub(crate) struct Upgrading {
    io: Box<dyn Io>,
    /// How much of the blank line that ends the answer was handed out; all of it means that it ended.
    blank_line: usize,
    /// What was read beyond the answer.
    early: Bytes,
}

const BLANK_LINE: &[u8; 4] = b"\r\n\r\n";
/// Read at once while the answer is awaited.
const ANSWER_PART: usize = 1024;

impl Upgrading {
    fn new(io: Box<dyn Io>) -> Self {
        Self { io, blank_line: 0, early: Bytes::new() }
    }

    /// A stream whose answer was read.
    #[cfg(test)]
    pub(crate) fn upgraded(io: Box<dyn Io>) -> Self {
        Self { blank_line: BLANK_LINE.len(), ..Self::new(io) }
    }
}

impl AsyncRead for Upgrading {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.early.is_empty() {
            let length = self.early.len().min(out.remaining());
            out.put_slice(&self.early.split_to(length));
            return Poll::Ready(Ok(()));
        }
        if self.blank_line == BLANK_LINE.len() {
            return Pin::new(&mut self.io).poll_read(cx, out);
        }
        let mut part = [0; ANSWER_PART];
        let mut part = ReadBuf::new(&mut part[..ANSWER_PART.min(out.remaining())]);
        ready!(Pin::new(&mut self.io).poll_read(cx, &mut part))?;
        let part = part.filled();
        let mut end = part.len();
        for (index, byte) in part.iter().enumerate() {
            self.blank_line = match self.blank_line {
                next if *byte == BLANK_LINE[next] => next + 1,
                _ => usize::from(*byte == BLANK_LINE[0]),
            };
            if self.blank_line == BLANK_LINE.len() {
                end = index + 1;
                break;
            }
        }
        let (answer, early) = part.split_at(end);
        out.put_slice(answer);
        self.early = Bytes::copy_from_slice(early);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Upgrading {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    bare == "localhost" || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn insecure_allowed() -> bool {
    std::env::var("CONNECT_ALLOW_INSECURE").is_ok_and(|value| value == "true" || value == "1")
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    #[track_caller]
    fn check(url: &str, expected: std::result::Result<&str, &str>) {
        let parsed = HubUrl::parse(&HubAddress { url: url.to_owned(), pin: None }, None);
        match (parsed, expected) {
            (Ok(parsed), Ok(authority)) => assert_eq!(parsed.authority(), authority),
            (Err(error), Err(part)) => {
                assert_eq!(error.kind, ErrorKind::Usage);
                assert!(error.message.contains(part), "{}", error.message);
            }
            (parsed, _) => panic!("{url}: {parsed:?}"),
        }
    }

    /// However the answer is cut into reads, it ends where it ends, and what follows is kept.
    #[tokio::test]
    async fn nothing_after_the_answer_is_lost() {
        let (answer, early) =
            (&b"HTTP/1.1 101 x\r\r\n a: b\r\n\r\n"[..], &b"\x82\x01z\r\n\r\n"[..]);
        let whole = [answer, early].concat();
        for cut in 1..whole.len() {
            let io = in_two_reads(&whole[..cut], &whole[cut..]);
            let mut upgrading = Upgrading::new(Box::new(io));
            let mut read = Vec::new();
            while read.len() < answer.len() {
                assert!(upgrading.read_buf(&mut read).await.expect("memory") > 0);
            }
            assert_eq!(read, answer, "cut at {cut}");
            let mut rest = Vec::new();
            upgrading.read_to_end(&mut rest).await.expect("memory");
            assert_eq!(rest, early, "cut at {cut}");
        }
    }

    /// Reads the one, then the other, then the end.
    fn in_two_reads(first: &[u8], second: &[u8]) -> impl Io + use<> {
        tokio::io::join(
            std::io::Cursor::new(first.to_vec()).chain(std::io::Cursor::new(second.to_vec())),
            tokio::io::sink(),
        )
    }

    #[tokio::test]
    async fn a_hub_says_when_to_come_again() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let answer =
                    b"HTTP/1.1 429 Too Many\r\nretry-after: 7\r\ncontent-length: 0\r\n\r\n";
                let mut request = [0; 1024];
                let _ = stream.read(&mut request).await;
                tokio::io::AsyncWriteExt::write_all(&mut stream, answer).await.expect("it reads");
            }
        });
        let url = HubAddress { url: format!("http://{address}"), pin: None };
        let hub = HubUrl::parse(&url, None).expect("a URL");
        let opened = hub.open("/v1/agent", &[], WebSocketConfig::default()).await;
        let error = opened.err().expect("it is refused");
        assert_eq!(error.kind, ErrorKind::HubUnreachable);
        assert_eq!(error.retry_in, Some(Duration::from_secs(7)));
        assert!(error.busy && error.message.contains("too many"), "{error}");
    }

    #[test]
    fn hub_urls_are_checked_before_they_are_dialled() {
        check("http://127.0.0.1:7420", Ok("127.0.0.1:7420"));
        check("http://localhost:7420/", Ok("localhost:7420"));
        check("ws://[::1]:7420", Ok("[::1]:7420"));
        check("https://Hub.Example.com", Ok("hub.example.com:443"));
        check("wss://10.0.0.1:7420", Ok("10.0.0.1:7420"));
        check("http://10.0.0.1:7420", Err("plain text"));
        check("ws://hub.example.com", Err("plain text"));
        check("ftp://hub.example.com", Err("scheme"));
        check("hub.example.com", Err("scheme"));
        check("https://", Err("URL"));
        check("https://user@hub.example.com", Err("only a host"));
        check("https://hub.example.com/path", Err("path"));
        check("not a url", Err("URL"));
    }
}
