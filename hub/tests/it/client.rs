//! A hand-made agent: keys, objects and frames, and no more.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use connect_spec::{
    bytes::Blob,
    control::{
        CreateWorkspace, EpochWrap, ErrorCode, FromAgent, FromHub, LOGIN_KIND, Login, Nonce,
        PresentedBlobs, REDEEM_KIND, Redeem, RegistrationToken, Reply, Request, SealedRecord,
        SessionKind, decode, encode, proof_text,
    },
    ids::{AgentId, CredentialId, LookupTag, ServiceId, WorkspaceId},
    keys::{
        IdentityKey, ML_KEM_768_EK_BYTES, Signature, StaticPublicKey, WrapPublicKey, signed_text,
    },
    limits::MAX_CERTS,
    log::{Beat, Change, Entry, EntryHash, Head, LogEntry, ObjectHash, Recovery},
    objects::{
        AgentRole, Certificate, Credential, CredentialKind, Founder, Genesis, Issuer, NoiseKey,
        SUITE_1, SignerRole,
    },
    signed::{Body, Signed},
};
use ed25519_dalek::{Signer as _, SigningKey};
use futures_util::{SinkExt as _, StreamExt as _};
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{Message, client::IntoClientRequest as _},
};

/// Far in the future.
const NEVER: u64 = 4_000_000_000;

/// A minute ago.
pub(crate) fn past() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    now.as_secs() - 60
}

static NEXT_KEY: AtomicU64 = AtomicU64::new(1);

/// A key that no other call gets.
pub(crate) fn new_key() -> SigningKey {
    let mut seed = [0; 32];
    seed[..8].copy_from_slice(&NEXT_KEY.fetch_add(1, Ordering::Relaxed).to_be_bytes());
    seed[8..12].copy_from_slice(&std::process::id().to_be_bytes());
    SigningKey::from_bytes(&seed)
}

pub(crate) fn public(key: &SigningKey) -> IdentityKey {
    IdentityKey(key.verifying_key().to_bytes())
}

fn sign(key: &SigningKey, kind: &str, body: &[u8]) -> Signature {
    Signature(key.sign(&signed_text(kind, body)).to_bytes())
}

fn signed<T: Body>(key: &SigningKey, object: &T) -> Signed<T> {
    let body = object.encode();
    let signature = sign(key, T::KIND, &body);
    Signed::new(body, vec![(public(key), signature)]).unwrap()
}

pub(crate) fn wrap_key(byte: u8) -> WrapPublicKey {
    WrapPublicKey { x25519: [byte; 32], ml_kem: Box::new([byte; ML_KEM_768_EK_BYTES]) }
}

pub(crate) fn wrap() -> EpochWrap {
    EpochWrap { epoch: 0, sealed: vec![0x77; 1200].into() }
}

pub(crate) fn record(counter: u32) -> SealedRecord {
    SealedRecord { epoch: 0, counter, sealed: vec![0x55; 600].into() }
}

/// A workspace with its one signer.
pub(crate) struct Workspace {
    pub(crate) signer: SigningKey,
    pub(crate) recovery: SigningKey,
    genesis: Signed<Genesis>,
    pub(crate) id: WorkspaceId,
}

impl Workspace {
    pub(crate) fn new() -> Self {
        let (signer, recovery) = (new_key(), new_key());
        let genesis = Genesis {
            suite: SUITE_1,
            salt: [1; 16],
            founders: vec![Founder { key: public(&signer), role: SignerRole::Owner }],
            recovery_key: public(&recovery),
            epoch_commit: [2; 32],
        };
        let genesis = signed(&signer, &genesis);
        let id = WorkspaceId(genesis.hash());
        Self { signer, recovery, genesis, id }
    }

    /// An agent whose certificate the signer signs.
    pub(crate) fn founder(&self) -> Agent {
        let key = new_key();
        let certificate =
            self.certificate(&key, Issuer::Signer(public(&self.signer)), AgentRole::Member);
        Agent::new(self.id, key, signed(&self.signer, &certificate), None)
    }

    /// The head of a log without entries.
    pub(crate) fn head(&self) -> Head {
        Head::genesis(self.id)
    }

    /// An entry by the founder.
    pub(crate) fn entry(&self, after: Head, changes: Vec<Change>) -> LogEntry {
        self.entry_by(&self.signer, after, changes, Vec::new())
    }

    pub(crate) fn entry_by(
        &self,
        signer: &SigningKey,
        after: Head,
        changes: Vec<Change>,
        abandons: Vec<EntryHash>,
    ) -> LogEntry {
        let entry = Entry {
            workspace_id: self.id,
            seq: after.seq + 1,
            prev: after.hash,
            time: 1_700_000_000,
            changes,
            abandons,
        };
        LogEntry::Entry(signed(signer, &entry))
    }

    /// A recovery that makes `owner` the only signer.
    pub(crate) fn recover(&self, base: Head, counter: u64, owner: &SigningKey) -> LogEntry {
        let recovery = Recovery {
            workspace_id: self.id,
            counter,
            base,
            signers: vec![Founder { key: public(owner), role: SignerRole::Owner }],
            recovery_key: public(&self.recovery),
            keep: Vec::new(),
            time: 1_700_000_000,
        };
        LogEntry::Recovery(signed(&self.recovery, &recovery))
    }

    /// The same agent with a new certificate by a signer.
    pub(crate) fn renewed(&self, agent: &Agent, signer: &SigningKey, serial: u64) -> Agent {
        let issuer = Issuer::Signer(public(signer));
        let mut certificate = self.certificate(&agent.key, issuer, AgentRole::Member);
        certificate.serial = serial;
        Agent { certificate: signed(signer, &certificate), credential: None, ..agent.clone() }
    }

    fn certificate(&self, key: &SigningKey, issuer: Issuer, role: AgentRole) -> Certificate {
        Certificate {
            workspace_id: self.id,
            identity_key: public(key),
            role,
            attrs: [3; 32],
            serial: 0,
            not_after: None,
            issuer,
            services: None,
        }
    }

    pub(crate) fn invite(&self, uses: u32, join_until: Option<u64>) -> Invite {
        let key = new_key();
        let credential = Credential {
            workspace_id: self.id,
            kind: CredentialKind::Invite,
            invite_key: public(&key),
            role: AgentRole::Member,
            attrs: [3; 32],
            services: None,
            uses,
            join_until: join_until.unwrap_or(NEVER),
            certs_end: join_until.map_or(NEVER, |time| time + MAX_CERTS.as_secs()),
            issuer: public(&self.signer),
            wrap_key_hash: wrap_key(9).hash(),
        };
        Invite { credential: signed(&self.signer, &credential), key }
    }

    /// A share of one service.
    pub(crate) fn share(&self, service: ServiceId) -> Invite {
        let key = new_key();
        let credential = Credential {
            workspace_id: self.id,
            kind: CredentialKind::Share,
            invite_key: public(&key),
            role: AgentRole::Guest,
            attrs: [3; 32],
            services: Some(vec![service]),
            uses: 1,
            join_until: NEVER,
            certs_end: NEVER,
            issuer: public(&self.signer),
            wrap_key_hash: wrap_key(9).hash(),
        };
        Invite { credential: signed(&self.signer, &credential), key }
    }

    /// An agent that makes its own certificate with an invite or a share.
    pub(crate) fn joiner(&self, invite: &Invite) -> Agent {
        let key = new_key();
        let credential = invite.credential.object();
        let issuer = Issuer::Credential(invite.credential.hash());
        let mut certificate = self.certificate(&key, issuer, credential.role);
        certificate.services.clone_from(&credential.services);
        let certificate = signed(&invite.key, &certificate);
        Agent::new(self.id, key, certificate, Some(invite.credential.clone()))
    }

    pub(crate) fn create(&self, token: Option<&str>) -> CreateWorkspace {
        CreateWorkspace {
            genesis: self.genesis.encode().into(),
            registration_token: token.map(|token| RegistrationToken(token.to_owned())),
        }
    }
}

pub(crate) struct Invite {
    key: SigningKey,
    pub(crate) credential: Signed<Credential>,
}

impl Invite {
    pub(crate) fn id(&self) -> CredentialId {
        self.credential.object().id()
    }

    pub(crate) fn request(&self) -> Request {
        let credential = self.credential.encode().into();
        match self.credential.object().kind {
            CredentialKind::Invite => {
                let wrap_key = wrap_key(9).encode().into();
                Request::CreateCredential { credential, wrap_key, wrap: wrap() }
            }
            CredentialKind::Share => {
                Request::CreateShare { credential, record: vec![7; 64].into() }
            }
        }
    }
}

/// Everything that an agent logs in with.
#[derive(Clone)]
pub(crate) struct Agent {
    pub(crate) workspace: WorkspaceId,
    pub(crate) id: AgentId,
    key: SigningKey,
    certificate: Signed<Certificate>,
    credential: Option<Signed<Credential>>,
    pub(crate) noise_counter: u64,
    pub(crate) static_key: [u8; 32],
}

impl Agent {
    fn new(
        workspace: WorkspaceId,
        key: SigningKey,
        certificate: Signed<Certificate>,
        credential: Option<Signed<Credential>>,
    ) -> Self {
        let id = certificate.object().agent_id();
        Self { workspace, id, key, certificate, credential, noise_counter: 1, static_key: [5; 32] }
    }

    pub(crate) fn certificate(&self) -> Blob {
        self.certificate.encode().into()
    }

    /// By which a closure keeps it.
    pub(crate) fn certificate_hash(&self) -> ObjectHash {
        ObjectHash(self.certificate.hash())
    }

    pub(crate) fn beat(&self, head: Head, time: u64) -> Blob {
        let beat = Beat { workspace_id: self.workspace, agent_id: self.id, head, time };
        signed(&self.key, &beat).encode().into()
    }

    fn noise_key(&self) -> Signed<NoiseKey> {
        let noise_key = NoiseKey {
            workspace_id: self.workspace,
            agent_id: self.id,
            suite: SUITE_1,
            counter: self.noise_counter,
            static_key: StaticPublicKey(self.static_key),
            wrap_key_hash: wrap_key(6).hash(),
        };
        signed(&self.key, &noise_key)
    }

    pub(crate) fn login(&self, authority: &str, hub_nonce: &Nonce) -> Login {
        let agent_nonce = Nonce([4; 32]);
        let text = proof_text(authority, hub_nonce, &agent_nonce, &self.id.0, &self.workspace);
        Login {
            authority: authority.to_owned(),
            agent_nonce,
            session: SessionKind::Agent,
            workspace_id: self.workspace,
            presented: PresentedBlobs {
                certificate: self.certificate.encode().into(),
                credential: self.credential.as_ref().map(|credential| credential.encode().into()),
                noise_key: self.noise_key().encode().into(),
            },
            wrap_key: wrap_key(6).encode().into(),
            signature: sign(&self.key, LOGIN_KIND, &text),
            create: None,
            moved: false,
        }
    }
}

/// A connection, in plain text or under TLS.
pub(crate) trait Connection: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Connection for T {}

pub(crate) type Stream = Box<dyn Connection>;

/// How a hub is dialled.
#[derive(Clone)]
pub(crate) struct Dialer {
    pub(crate) address: SocketAddr,
    pub(crate) authority: String,
    pub(crate) tls: Option<(TlsConnector, ServerName<'static>)>,
    /// What a proxy on the way would say.
    pub(crate) forwarded_for: Option<String>,
}

impl Dialer {
    pub(crate) fn plain(address: SocketAddr) -> Self {
        Self { address, authority: address.to_string(), tls: None, forwarded_for: None }
    }

    /// As an agent dials that trusts this one certificate.
    pub(crate) fn pinned(
        address: SocketAddr,
        authority: &str,
        certificate: CertificateDer<'static>,
    ) -> Self {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(certificate).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let (host, _) = authority.split_once(':').unwrap();
        let name = ServerName::try_from(host.to_owned()).unwrap();
        let tls = Some((TlsConnector::from(Arc::new(config)), name));
        Self { address, authority: authority.to_owned(), tls, forwarded_for: None }
    }

    pub(crate) async fn dial(&self) -> Stream {
        let stream = TcpStream::connect(self.address).await.unwrap();
        match &self.tls {
            None => Box::new(stream),
            Some((tls, name)) => Box::new(tls.connect(name.clone(), stream).await.unwrap()),
        }
    }

    /// A request for a WebSocket.
    pub(crate) fn request(&self, path: &str) -> http::Request<()> {
        let mut request = format!("ws://{}{path}", self.authority).into_client_request().unwrap();
        if let Some(client) = &self.forwarded_for {
            request.headers_mut().insert("x-forwarded-for", client.parse().unwrap());
        }
        request
    }

    pub(crate) async fn control(&self) -> Control {
        Control::over(self.dial().await, self.request("/v1/agent"), &self.authority).await
    }
}

/// One control socket.
pub(crate) struct Control {
    pub(crate) socket: WebSocketStream<Stream>,
    pub(crate) authority: String,
    pub(crate) nonce: Nonce,
    next_id: u64,
    /// What came before a reply.
    events: VecDeque<FromHub>,
}

impl Control {
    pub(crate) async fn connect(hub: SocketAddr) -> Self {
        Dialer::plain(hub).control().await
    }

    /// Connects and logs in; the workspace is created by whoever comes first.
    pub(crate) async fn log_in(hub: SocketAddr, workspace: &Workspace, agent: &Agent) -> Self {
        let mut control = Self::connect(hub).await;
        let mut login = agent.login(&control.authority, &control.nonce);
        login.create = Some(workspace.create(None));
        control.send(FromAgent::Login(Box::new(login))).await;
        control.expect_welcome().await;
        control
    }

    async fn over(stream: Stream, request: http::Request<()>, authority: &str) -> Self {
        let (socket, _) = client_async(request, stream).await.unwrap();
        let mut control = Self {
            socket,
            authority: authority.to_owned(),
            nonce: Nonce([0; 32]),
            next_id: 0,
            events: VecDeque::new(),
        };
        match control.receive().await {
            FromHub::Challenge { version: 1, nonce } => control.nonce = nonce,
            other => panic!("{other:?}"),
        }
        control
    }

    pub(crate) async fn send(&mut self, message: FromAgent) {
        self.socket.send(Message::text(encode(&message))).await.unwrap();
    }

    pub(crate) async fn receive(&mut self) -> FromHub {
        loop {
            match self.socket.next().await.unwrap().unwrap() {
                Message::Text(text) => return decode(&text).unwrap(),
                Message::Ping(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// Logs in and gives what the hub answers.
    pub(crate) async fn try_log_in(
        &mut self,
        agent: &Agent,
        change: impl FnOnce(&mut Login),
    ) -> FromHub {
        let mut login = agent.login(&self.authority, &self.nonce);
        change(&mut login);
        self.send(FromAgent::Login(Box::new(login))).await;
        self.receive().await
    }

    pub(crate) async fn expect_welcome(&mut self) {
        match self.receive().await {
            FromHub::Welcome { .. } => {}
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn redeem(&mut self, workspace: &Workspace, invite: &Invite) -> FromHub {
        self.redeem_by(workspace, invite, &invite.key).await
    }

    /// Redeems an invite with a proof by some key.
    pub(crate) async fn redeem_by(
        &mut self,
        workspace: &Workspace,
        invite: &Invite,
        key: &SigningKey,
    ) -> FromHub {
        let agent_nonce = Nonce([4; 32]);
        let text =
            proof_text(&self.authority, &self.nonce, &agent_nonce, &invite.id().0, &workspace.id);
        self.send(FromAgent::Redeem(Redeem {
            authority: self.authority.clone(),
            agent_nonce,
            workspace_id: workspace.id,
            invite_key: public(&invite.key),
            signature: sign(key, REDEEM_KIND, &text),
        }))
        .await;
        self.receive().await
    }

    /// Sends a request and gives its id.
    pub(crate) async fn ask(&mut self, request: Request) -> u64 {
        self.next_id += 1;
        self.send(FromAgent::Request { id: self.next_id, request }).await;
        self.next_id
    }

    pub(crate) async fn request(&mut self, request: Request) -> Reply {
        let asked = self.ask(request).await;
        loop {
            match self.receive().await {
                FromHub::Reply { id, reply } if id == asked => return reply,
                event @ (FromHub::LogGrew { .. }
                | FromHub::WrapStored { .. }
                | FromHub::ShareMade { .. }) => {
                    self.events.push_back(event);
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// The next event, whether it came before a reply or comes yet.
    pub(crate) async fn event(&mut self) -> FromHub {
        match self.events.pop_front() {
            Some(event) => event,
            None => self.receive().await,
        }
    }

    /// Waits until the hub tells of this head.
    pub(crate) async fn expect_head(&mut self, head: Head) {
        loop {
            match self.event().await {
                FromHub::LogGrew { head: told } if told == head => return,
                FromHub::LogGrew { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }

    pub(crate) async fn append(&mut self, entries: &[LogEntry]) -> Reply {
        let entries = entries.iter().map(|entry| entry.encode().into()).collect();
        self.request(Request::Append { entries }).await
    }

    /// All entries after the newest of these places that the hub has.
    pub(crate) async fn log(&mut self, have: &[Head]) -> (Head, Vec<LogEntry>) {
        let (mut start, mut log) = (None, Vec::new());
        let mut have = have.to_vec();
        loop {
            match self.request(Request::Log { have }).await {
                Reply::Log { after, entries, more } => {
                    start.get_or_insert(after);
                    log.extend(entries.iter().map(|entry| LogEntry::decode(&entry.0).unwrap()));
                    if !more {
                        return (start.unwrap(), log);
                    }
                    assert!(!entries.is_empty());
                    have = vec![log.last().unwrap().head()];
                }
                other => panic!("{other:?}"),
            }
        }
    }

    pub(crate) async fn done(&mut self, request: Request) {
        assert_eq!(self.request(request).await, Reply::Done);
    }

    pub(crate) async fn refused(&mut self, request: Request) -> ErrorCode {
        match self.request(request).await {
            Reply::Error(report) => report.code,
            other => panic!("{other:?}"),
        }
    }

    /// Waits for the close frame, past any error that precedes it.
    pub(crate) async fn expect_close(mut self, code: u16) {
        loop {
            match self.socket.next().await {
                Some(Ok(Message::Close(Some(frame)))) => {
                    assert_eq!(u16::from(frame.code), code);
                    return;
                }
                Some(Ok(_)) => {}
                other => panic!("expected a close with {code}, got {other:?}"),
            }
        }
    }
}

pub(crate) fn error_code(message: FromHub) -> ErrorCode {
    match message {
        FromHub::Error(report) => report.code,
        other => panic!("{other:?}"),
    }
}

pub(crate) fn expose(service: ServiceId, tag: LookupTag, counter: u32) -> Request {
    Request::Expose { service_id: service, tag, record: record(counter), take_over: false }
}

pub(crate) fn blob(length: usize) -> Blob {
    vec![0x33; length].into()
}
