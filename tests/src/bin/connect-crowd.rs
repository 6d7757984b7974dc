//! Many agents that do nothing, to see what each of them costs a hub.

use std::{
    fs,
    io::{self, Write},
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, bail};
use clap::Parser;
use connect_crypto::keys::{SigningKey, StaticKeypair, WrapKeypair};
use connect_spec::{
    bytes::Blob,
    control::{self, AGENT_PATH, FromAgent, FromHub, LOGIN_KIND, Login, Nonce, SessionKind},
    ids::AgentId,
    objects::{AgentRole, Certificate, Issuer, NoiseKey, SUITE_1},
    trust::Presented,
};
use connect_tests::{
    client::{Keys, rng},
    home::Home,
    raise_file_limit, random, runtime,
};
use futures_util::{SinkExt, StreamExt};
use rustls::{
    ClientConfig,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, sleep},
};
use tokio_rustls::TlsConnector;
use tokio_tungstenite::{
    WebSocketStream, client_async_with_config,
    tungstenite::{Message, protocol::WebSocketConfig},
};

/// Log in many agents that do nothing, and print what each of them costs the hub.
///
/// The agents are made up: the signer of HOME certifies each of them, none has a home of its own, and all
/// live in this process. Memory and processor time are those of the hub's process, its PostgreSQL aside.
#[derive(Debug, Parser)]
#[command(name = "connect-crowd", version, after_help = EXAMPLES)]
struct Args {
    /// Where the hub listens.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:7420")]
    hub: SocketAddr,
    /// Speak TLS, and believe any certificate.
    #[arg(long)]
    tls: bool,
    /// Home of the agent that founded the workspace, with a signer key that has no passphrase.
    #[arg(long, value_name = "HOME")]
    home: PathBuf,
    /// How many agents.
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    agents: usize,
    /// The hub's process.
    #[arg(long, value_name = "PID")]
    pid: u32,
    /// How long they rest while the hub is watched.
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    rest: u64,
}

const EXAMPLES: &str = "\
Example:
  connect-hub serve &
  CONNECT_HOME=/tmp/founder connect init --hub http://127.0.0.1:7420
  connect-crowd --home /tmp/founder --pid $! --agents 10000";

/// Logins that run at once: enough to keep the hub's database busy.
const AT_ONCE: usize = 32;
/// After the last login, before the hub is watched: its own work is over by then.
const SETTLE: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let args = Args::parse();
    raise_file_limit();
    match runtime().block_on(run(args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody reads what cannot be written.
            let _ = writeln!(io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Args) -> anyhow::Result<()> {
    let founder = Keys::of(&Home::at(args.home));
    if founder.signer.is_none() {
        bail!("the home has no signer key that can be read");
    }
    let maker = Arc::new(Maker {
        founder,
        hub: args.hub,
        tls: args.tls.then(believing).transpose()?,
        wrap: WrapKeypair::generate(&mut rng()),
    });
    let before = Usage::of(args.pid)?;
    let start = Instant::now();
    let places = Arc::new(Semaphore::new(AT_ONCE));
    let mut agents = JoinSet::new();
    let mut logged_in = JoinSet::new();
    for _ in 0..args.agents {
        let (maker, place) = (maker.clone(), places.clone().acquire_owned().await?);
        logged_in.spawn(async move {
            let socket = maker.log_in().await;
            drop(place);
            socket
        });
    }
    while let Some(socket) = logged_in.join_next().await {
        agents.spawn(rest(socket??));
    }
    say(format_args!("{} agents logged in, in {:.0?}", args.agents, start.elapsed()))?;

    sleep(SETTLE).await;
    let begin = Usage::of(args.pid)?;
    sleep(Duration::from_secs(args.rest)).await;
    let end = Usage::of(args.pid)?;
    let each = end.resident_kib.saturating_sub(before.resident_kib) as f64 / args.agents as f64;
    say(format_args!(
        "memory: {} KiB before, {} KiB with them: {each:.1} KiB each",
        before.resident_kib, end.resident_kib
    ))?;
    let spent = (end.ticks - begin.ticks) as f64 / TICKS_PER_SEC;
    let share = 100.0 * spent / args.rest as f64;
    say(format_args!("processor: {spent:.2} s in {} s: {share:.2} % of a core", args.rest))?;
    let mut ended = 0;
    let mut why = None;
    while let Some(session) = agents.try_join_next() {
        ended += 1;
        why.get_or_insert(session?);
    }
    match why {
        None => Ok(()),
        Some(why) => bail!("{ended} sessions ended, the first so: {why}"),
    }
}

fn say(line: std::fmt::Arguments<'_>) -> anyhow::Result<()> {
    Ok(writeln!(io::stdout(), "{line}")?)
}

/// `USER_HZ` of Linux, which is 100 on every platform that we run on.
const TICKS_PER_SEC: f64 = 100.0;

/// What a process uses.
struct Usage {
    resident_kib: u64,
    ticks: u64,
}

impl Usage {
    /// Reads proc(5).
    fn of(pid: u32) -> anyhow::Result<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))
            .with_context(|| format!("there is no process {pid}"))?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let resident = resident.and_then(|rest| rest.split_whitespace().next());
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // After the name, which may contain anything, `utime` and `stime` are the 12th and 13th field.
        let rest = stat.rsplit_once(')').context("a stat line")?.1;
        let mut fields = rest.split_whitespace().skip(11);
        let mut ticks = 0;
        for _ in 0..2 {
            ticks += fields.next().context("a stat line")?.parse::<u64>()?;
        }
        Ok(Self { resident_kib: resident.context("a VmRSS line")?.parse()?, ticks })
    }
}

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

type Socket = WebSocketStream<Box<dyn Io>>;

/// Makes agents and their sessions.
struct Maker {
    founder: Keys,
    hub: SocketAddr,
    tls: Option<TlsConnector>,
    /// One for all: nothing is wrapped to them.
    wrap: WrapKeypair,
}

impl Maker {
    async fn log_in(&self) -> anyhow::Result<Socket> {
        let tcp = TcpStream::connect(self.hub).await?;
        let io: Box<dyn Io> = match &self.tls {
            None => Box::new(tcp),
            Some(tls) => Box::new(tls.connect(ServerName::from(self.hub.ip()), tcp).await?),
        };
        let config = WebSocketConfig::default().read_buffer_size(1024).write_buffer_size(0);
        let url = format!("ws://{}{AGENT_PATH}", self.hub);
        let (mut socket, _) = client_async_with_config(url, io, Some(config)).await?;
        let FromHub::Challenge { nonce, .. } = read(&mut socket).await? else {
            bail!("no challenge");
        };
        let login = control::encode(&FromAgent::Login(Box::new(self.login(&nonce))));
        socket.send(Message::text(login)).await?;
        let answer = read(&mut socket).await?;
        if !matches!(answer, FromHub::Welcome { .. }) {
            bail!("no welcome but {answer:?}");
        }
        Ok(socket)
    }

    /// A login of an agent that nobody has seen before.
    fn login(&self, nonce: &Nonce) -> Login {
        let workspace_id = self.founder.workspace_id;
        let signer = self.founder.signer.as_ref().expect("it was looked for at the start");
        let signing = SigningKey::generate(&mut rng());
        let agent_id = AgentId::of(&workspace_id, &signing.public());
        let certificate = signer.sign(&Certificate {
            workspace_id,
            identity_key: signing.public(),
            role: AgentRole::Member,
            attrs: self.founder.attrs.hash(),
            serial: 1,
            not_after: None,
            issuer: Issuer::Signer(signer.public()),
            services: None,
        });
        let noise_key = signing.sign(&NoiseKey {
            workspace_id,
            agent_id,
            suite: SUITE_1,
            counter: 1,
            static_key: StaticKeypair::generate(&mut rng()).public(),
            wrap_key_hash: self.wrap.public().hash(),
        });
        let (authority, agent_nonce) =
            (self.hub.to_string(), Nonce(random(32).try_into().expect("32 bytes")));
        let text = control::proof_text(&authority, nonce, &agent_nonce, &agent_id.0, &workspace_id);
        Login {
            authority,
            agent_nonce,
            session: SessionKind::Agent,
            workspace_id,
            presented: Presented { certificate, credential: None, noise_key }.to_blobs(),
            wrap_key: Blob(self.wrap.public().encode()),
            signature: signing.sign_text(LOGIN_KIND, &text),
            create: None,
            moved: false,
        }
    }
}

async fn read(socket: &mut Socket) -> anyhow::Result<FromHub> {
    loop {
        match socket.next().await.context("the hub closed the connection")?? {
            Message::Text(text) => return Ok(control::decode(&text)?),
            Message::Ping(_) | Message::Pong(_) => {}
            other @ (Message::Binary(_) | Message::Close(_) | Message::Frame(_)) => {
                bail!("the hub says {other:?}")
            }
        }
    }
}

/// Answers pings for as long as the session lives; why it ended.
async fn rest(mut socket: Socket) -> String {
    loop {
        match socket.next().await {
            Some(Ok(Message::Close(frame))) => return format!("closed by the hub: {frame:?}"),
            Some(Ok(_)) => {
                // The pong that the library has queued.
                if let Err(error) = socket.flush().await {
                    return format!("the answer to a ping was not sent: {error}");
                }
            }
            Some(Err(error)) => return error.to_string(),
            None => return "the end of the socket".to_owned(),
        }
    }
}

/// TLS without a look at the certificate: this program measures, and has nothing to hide.
fn believing() -> anyhow::Result<TlsConnector> {
    let provider = Arc::new(ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Believer(provider)))
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

#[derive(Debug)]
struct Believer(Arc<CryptoProvider>);

impl ServerCertVerifier for Believer {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
