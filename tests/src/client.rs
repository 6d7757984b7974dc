//! A hand-made client: speaks the control channel with an agent's keys, and says what it likes.

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use connect_crypto::{
    epoch::{EpochSecrets, ShareSecret},
    handshake,
    keys::{SigningKey, StaticKeypair, WrapKeypair},
    names::NameKeys,
    transport::{Opener, Sealer, Transport},
};
use connect_spec::{
    bytes::Blob,
    control::{
        self, AGENT_PATH, FromAgent, FromHub, LOGIN_KIND, Login, Nonce, PresentedBlobs, Reply,
        Request, SealedRecord, SessionKind, TICKET_SCHEME, TUNNEL_PATH, Ticket, TunnelRequest,
    },
    encoding::Encoding,
    ids::{AgentId, ChannelId, CredentialId, ServiceId, ServiceName, TunnelId, WorkspaceId},
    log::{Head, LogEntry},
    objects::{Attributes, Genesis, ServiceRecord, UnixTime},
    prologue::{Prologue, Realm},
    record::{Record, trust_entries},
    signed::Signed,
    trust::{Presented, TrustState},
};
use futures_util::{SinkExt, StreamExt};
use http::{HeaderValue, header};
use rand_core::UnwrapErr;
use serde_json::Value;
use tokio::{net::TcpStream, time::timeout};
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{self, Message, client::IntoClientRequest},
};

use crate::{PATIENCE, home::Home, random};

/// The generator that `connect-crypto` draws from.
#[must_use]
pub fn rng() -> UnwrapErr<getrandom::SysRng> {
    UnwrapErr(getrandom::SysRng)
}

/// This machine's clock, in seconds since 1970.
#[must_use]
pub fn now() -> UnixTime {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// An agent's identity, as its home holds it.
#[derive(Debug)]
pub struct Keys {
    /// The workspace.
    pub workspace_id: WorkspaceId,
    /// The agent.
    pub agent_id: AgentId,
    /// Its identity key.
    pub signing: SigningKey,
    /// Its static key.
    pub static_keypair: StaticKeypair,
    /// Opens what is wrapped to it.
    pub wrap: WrapKeypair,
    /// The workspace's secrets.
    pub epoch: EpochSecrets,
    /// The epoch that they belong to.
    pub epoch_number: u32,
    /// The keys that hide names.
    pub names: NameKeys,
    /// Certificate, credential and NoiseKey.
    pub presented: Presented,
    /// Its tags.
    pub attrs: Attributes,
    /// What it trusts.
    pub trust: TrustState,
    /// The signer key, in a founder's home.
    pub signer: Option<SigningKey>,
}

fn secret<const N: usize>(file: &Path, name: &str) -> Option<[u8; N]> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
    let mut bytes = [0; N];
    hex::decode_to_slice(line, &mut bytes).ok()?;
    Some(bytes)
}

/// What the log in a home says, as far as it reaches.
fn trust_of(home: &Home, workspace: WorkspaceId, genesis: &Signed<Genesis>) -> TrustState {
    let mut trust = TrustState::from_genesis(workspace, genesis).expect("a sound genesis");
    let head = fs::read(home.dir().join("trust/head.json")).expect("enrolled");
    let head: Value = serde_json::from_slice(&head).expect("JSON");
    let file = format!("trust/log-{}", head["file"]);
    let log = fs::read(home.dir().join(file)).expect("enrolled");
    for wire in trust_entries(&log).expect("whole entries") {
        let entry = LogEntry::decode(wire).expect("an entry");
        trust.apply(&entry).expect("an entry that holds");
    }
    trust
}

impl Keys {
    /// Reads them.
    ///
    /// # Panics
    /// When the home is not enrolled.
    #[must_use]
    pub fn of(home: &Home) -> Self {
        let keys = home.dir().join("agent.key");
        let membership = fs::read(home.dir().join("membership.json")).expect("enrolled");
        let membership: Value = serde_json::from_slice(&membership).expect("JSON");
        let workspace_id =
            membership["workspace_id"].as_str().and_then(|id| id.parse().ok()).expect("an id");
        let blobs: PresentedBlobs =
            serde_json::from_value(membership.clone()).expect("what the agent presents");
        let salt: Blob = serde_json::from_value(membership["salt"].clone()).expect("a salt");
        let tags: Vec<String> =
            serde_json::from_value(membership["tags"].clone()).expect("a list of tags");
        let genesis = fs::read(home.dir().join("trust/genesis")).expect("enrolled");
        let genesis = Signed::decode(&genesis).expect("a genesis");
        let signing: [u8; 32] = secret(&keys, "identity").expect("a key");
        let signing = SigningKey::from_seed(signing.into());
        let presented = Presented::from_blobs(&blobs).expect("sound objects");
        let static_line = format!("static-{}", presented.noise_key.object().counter);
        let static_secret: [u8; 32] = secret(&keys, &static_line).expect("a key");
        let wrap: [u8; 96] = secret(&keys, "wrap").expect("a key");
        let trust = trust_of(home, workspace_id, &genesis);
        let epochs = home.dir().join("epochs.key");
        let newest = (0..=trust.epoch()).rev().find_map(|epoch| {
            let secrets: Option<[u8; 64]> = secret(&epochs, &format!("epoch-{epoch}"));
            Some((epoch, EpochSecrets::from_bytes(secrets?.into())))
        });
        let share = || {
            let secret: [u8; 32] = secret(&epochs, "share").expect("a key");
            (0, ShareSecret::from_bytes(secret.into()).secrets())
        };
        let (epoch_number, epoch) = newest.unwrap_or_else(share);
        let signer: Option<[u8; 32]> = secret(&home.dir().join("signer.key"), "signer");
        Self {
            workspace_id,
            agent_id: AgentId::of(&workspace_id, &signing.public()),
            signing,
            static_keypair: StaticKeypair::from_secret(static_secret.into()),
            wrap: WrapKeypair::from_seed(wrap.into()),
            names: NameKeys::derive(&epoch.names),
            epoch,
            epoch_number,
            presented,
            attrs: Attributes::new(salt.0.try_into().expect("16 bytes"), tags).expect("tags"),
            trust,
            signer: signer.map(|seed| SigningKey::from_seed(seed.into())),
        }
    }

    /// This agent's side of a handshake, with any head.
    fn local(&self, head: Head) -> handshake::Local<'_> {
        handshake::Local {
            static_keypair: &self.static_keypair,
            presented: &self.presented,
            attrs: &self.attrs,
            head,
            realm_secret: &self.epoch.realm,
        }
    }

    /// The login that answers a challenge.
    #[must_use]
    pub fn login(&self, hub: SocketAddr, nonce: &Nonce, session: SessionKind) -> Login {
        let (authority, agent_nonce) = (hub.to_string(), Nonce([7; 32]));
        let text = control::proof_text(
            &authority,
            nonce,
            &agent_nonce,
            &self.agent_id.0,
            &self.workspace_id,
        );
        Login {
            authority,
            agent_nonce,
            session,
            workspace_id: self.workspace_id,
            presented: self.presented.to_blobs(),
            wrap_key: Blob(self.wrap.public().encode()),
            signature: self.signing.sign_text(LOGIN_KIND, &text),
            create: None,
            moved: false,
        }
    }
}

/// A control socket.
#[derive(Debug)]
pub struct Client {
    socket: WebSocketStream<TcpStream>,
    /// What the hub asked this connection to sign.
    pub nonce: Nonce,
    last_id: u64,
}

impl Client {
    /// Opens a control socket and reads the challenge.
    pub async fn dial(hub: SocketAddr) -> Self {
        let tcp = TcpStream::connect(hub).await.expect("the hub listens");
        tcp.set_nodelay(true).expect("our own socket");
        let (socket, _) = client_async(format!("ws://{hub}{AGENT_PATH}"), tcp)
            .await
            .expect("it speaks WebSocket");
        let mut client = Self { socket, nonce: Nonce([0; 32]), last_id: 0 };
        let Some(FromHub::Challenge { nonce, .. }) = client.next().await else {
            panic!("no challenge");
        };
        client.nonce = nonce;
        client
    }

    /// Opens a control socket and logs in.
    pub async fn login(hub: SocketAddr, keys: &Keys, session: SessionKind) -> Self {
        let mut client = Self::dial(hub).await;
        let login = keys.login(hub, &client.nonce, session);
        client.send(&FromAgent::Login(Box::new(login))).await;
        let welcome = client.next().await;
        assert!(matches!(welcome, Some(FromHub::Welcome { .. })), "{welcome:?}");
        client
    }

    /// Sends a message of the protocol.
    pub async fn send(&mut self, message: &FromAgent) {
        self.send_raw(Message::text(control::encode(message))).await;
    }

    /// Sends anything.
    pub async fn send_raw(&mut self, message: Message) {
        // The hub may have closed already, which the test sees when it reads.
        let _ = self.socket.send(message).await;
    }

    /// The next message; `None` when the hub closed.
    pub async fn next(&mut self) -> Option<FromHub> {
        loop {
            match timeout(PATIENCE, self.socket.next()).await.expect("the hub answers")? {
                Ok(Message::Text(text)) => {
                    return Some(control::decode(&text).expect("a message of the protocol"));
                }
                Ok(Message::Ping(_) | Message::Pong(_)) => {}
                Ok(Message::Binary(_) | Message::Close(_) | Message::Frame(_)) | Err(_) => {
                    return None;
                }
            }
        }
    }

    /// Reads to the end; the code with which the hub closed, if it said one.
    pub async fn close_code(mut self) -> Option<u16> {
        loop {
            match timeout(PATIENCE, self.socket.next()).await.expect("the hub closes")? {
                Ok(Message::Close(frame)) => return frame.map(|frame| frame.code.into()),
                Ok(_) => {}
                Err(_) => return None,
            }
        }
    }

    /// The bare connection under the WebSocket.
    #[must_use]
    pub fn into_tcp(self) -> TcpStream {
        self.socket.into_inner()
    }

    /// Asks and waits for the reply; what else comes meanwhile is not kept.
    pub async fn request(&mut self, request: Request) -> Reply {
        self.last_id += 1;
        let asked = self.last_id;
        self.send(&FromAgent::Request { id: asked, request }).await;
        loop {
            let message = self.next().await.expect("the session goes on");
            if let FromHub::Reply { id, reply } = message
                && id == asked
            {
                return reply;
            }
        }
    }
}

/// Opens a data socket with this text after `Authorization: Ticket `; the HTTP status of a refusal.
///
/// # Errors
/// The status.
pub async fn data_socket(
    hub: SocketAddr,
    ticket: &str,
    encoding: Encoding,
) -> Result<WebSocketStream<TcpStream>, u16> {
    let mut request = format!("ws://{hub}{TUNNEL_PATH}").into_client_request().expect("a URL");
    let authorization =
        HeaderValue::from_str(&format!("{TICKET_SCHEME} {ticket}")).expect("printable");
    let protocol = HeaderValue::from_static(encoding.subprotocol());
    request.headers_mut().insert(header::AUTHORIZATION, authorization);
    request.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, protocol);
    let tcp = TcpStream::connect(hub).await.expect("the hub listens");
    match timeout(PATIENCE, client_async(request, tcp)).await.expect("the hub answers") {
        Ok((socket, _)) => Ok(socket),
        Err(tungstenite::Error::Http(response)) => Err(response.status().as_u16()),
        Err(error) => panic!("{error}"),
    }
}

/// A request for a tunnel whose handshake message is noise: enough for a hub, not for an exposer.
#[must_use]
pub fn tunnel_request(service_id: ServiceId, responder: AgentId) -> TunnelRequest {
    TunnelRequest {
        tunnel_id: TunnelId(random(16).try_into().expect("16 bytes")),
        service_id,
        responder,
        share_id: CredentialId::NONE,
        channel_id: ChannelId([1; 16]),
        tunnel_no: 0,
        encoding: Encoding::Base64,
        message: Blob(vec![7; 2000]),
    }
}

/// A record that nobody can open: enough for a hub.
#[must_use]
pub fn sealed(counter: u32) -> SealedRecord {
    SealedRecord { epoch: 0, counter, sealed: Blob(vec![9; 512]) }
}

/// Gets a tunnel from one hand-made client to another; the tickets of the exposer and the reacher, and the
/// sessions: the reacher's ticket ends with its own.
pub async fn tickets(
    hub: SocketAddr,
    exposer: &Keys,
    reacher: &Keys,
) -> (String, String, [Client; 2]) {
    let mut expose = Client::login(hub, exposer, SessionKind::Agent).await;
    let mut reach = Client::login(hub, reacher, SessionKind::Agent).await;
    let service_id = ServiceId([5; 16]);
    let tag = exposer.names.tag(&"svc".parse().expect("a name"));
    let reply = expose
        .request(Request::Expose { service_id, tag, record: sealed(1), take_over: false })
        .await;
    assert_eq!(reply, Reply::Done);
    let request = Request::OpenTunnel(tunnel_request(service_id, exposer.agent_id));
    reach.send(&FromAgent::Request { id: 1, request }).await;
    let Some(FromHub::IncomingTunnel { initiator, request, ticket }) = expose.next().await else {
        panic!("the exposer is asked");
    };
    assert_eq!(initiator, reacher.agent_id);
    let exposers = ticket.reveal().to_owned();
    let message = Blob(vec![7; 2000]);
    expose.send(&FromAgent::AcceptTunnel { tunnel_id: request.tunnel_id, message }).await;
    let Some(FromHub::Reply { reply: Reply::TunnelAccepted { ticket, .. }, .. }) =
        reach.next().await
    else {
        panic!("the reacher is answered");
    };
    assert_ne!(exposers, ticket.reveal());
    (exposers, ticket.reveal().to_owned(), [expose, reach])
}

/// The prologue of a request for a tunnel, as both ends compute it.
#[must_use]
pub fn prologue(
    workspace_id: WorkspaceId,
    initiator: AgentId,
    request: &TunnelRequest,
) -> Prologue {
    Prologue {
        workspace_id,
        tunnel_id: request.tunnel_id,
        service_id: request.service_id,
        initiator,
        responder: request.responder,
        share_id: request.share_id,
        channel_id: request.channel_id,
        tunnel_no: request.tunnel_no,
        rekey: 0,
        previous_hash: [0; 32],
        realm: Realm::Member,
        encoding: request.encoding,
    }
}

/// One end of a tunnel in the hands of somebody who does not keep to the rules.
#[derive(Debug)]
pub struct Tunnel {
    socket: WebSocketStream<TcpStream>,
    sealer: Sealer,
    opener: Opener,
}

impl Tunnel {
    /// Opens a tunnel to a service, naming `head` as this agent's place in the trust log.
    ///
    /// # Errors
    /// What the hub, or the exposer through it, answered; or that the exposer's own answer does not hold.
    pub async fn open(
        hub: SocketAddr,
        keys: &Keys,
        service: ServiceId,
        head: Head,
    ) -> Result<Self, String> {
        let channel = ChannelId(random(16).try_into().expect("16 bytes"));
        Self::open_in(hub, keys, service, head, (channel, 0)).await
    }

    /// As [`Tunnel::open`], as the tunnel of this number of a channel.
    ///
    /// # Errors
    /// As there.
    pub async fn open_in(
        hub: SocketAddr,
        keys: &Keys,
        service: ServiceId,
        head: Head,
        (channel_id, tunnel_no): (ChannelId, u32),
    ) -> Result<Self, String> {
        let mut client = Client::login(hub, keys, SessionKind::Command).await;
        let reply = client.request(Request::Services { after: None }).await;
        let Reply::Services { services, .. } = &reply else {
            return Err("the hub lists nothing".to_owned());
        };
        let mut services = services.iter();
        let listed = services.find(|listed| listed.service_id == service).ok_or("not listed")?;
        let record = keys
            .names
            .open_service(&keys.workspace_id, listed.service_id, listed.agent_id, &listed.record)
            .map_err(|error| error.to_string())?;
        let presented = record.object().noise_key.object();
        let request = tunnel_request(listed.service_id, listed.agent_id);
        let mut request = TunnelRequest { channel_id, tunnel_no, ..request };
        let prologue = prologue(keys.workspace_id, keys.agent_id, &request);
        let (waiting, message) =
            handshake::initiate(&keys.local(head), &prologue, &presented.static_key, &mut rng())
                .map_err(|error| error.to_string())?;
        request.message = Blob(message);
        let answer = client.request(Request::OpenTunnel(request)).await;
        let Reply::TunnelAccepted { message, ticket } = &answer else {
            return Err(format!("{answer:?}"));
        };
        let reply = waiting.read(&message.0).map_err(|error| error.to_string())?;
        let presented = reply.payload().presented.clone();
        let exposer = keys
            .trust
            .verify_peer(listed.agent_id, presented, now())
            .map_err(|error| error.to_string())?;
        let transport = reply.confirm(&exposer).map_err(|error| error.to_string())?;
        Self::over(hub, ticket, transport).await
    }

    /// Exposes a service, and answers the first who asks for a tunnel with `head` as this agent's place
    /// in the trust log.
    ///
    /// # Errors
    /// That the asker is nobody who may ask.
    pub async fn answer_one(
        hub: SocketAddr,
        keys: &Keys,
        name: &ServiceName,
        head: Head,
    ) -> Result<Self, String> {
        let mut client = Client::login(hub, keys, SessionKind::Agent).await;
        let record = keys.signing.sign(&ServiceRecord {
            workspace_id: keys.workspace_id,
            service_id: ServiceId(random(16).try_into().expect("16 bytes")),
            agent_id: keys.agent_id,
            counter: 1,
            epoch: keys.epoch_number,
            name: name.clone(),
            protocol: "tcp".to_owned(),
            certificate: keys.presented.certificate.clone(),
            credential: keys.presented.credential.clone(),
            noise_key: keys.presented.noise_key.clone(),
            port_hint: None,
            target_ok: None,
        });
        let expose = Request::Expose {
            service_id: record.object().service_id,
            tag: keys.names.tag(name),
            record: keys.names.seal_service(&record, &mut rng()).expect("it fits"),
            take_over: false,
        };
        assert_eq!(client.request(expose).await, Reply::Done);
        let (initiator, request, ticket) = loop {
            match client.next().await {
                Some(FromHub::IncomingTunnel { initiator, request, ticket }) => {
                    break (initiator, request, ticket);
                }
                Some(_) => {}
                None => return Err("the hub closed".to_owned()),
            }
        };
        let prologue = prologue(keys.workspace_id, initiator, &request);
        let received = handshake::receive(&keys.static_keypair, &prologue, &request.message.0)
            .map_err(|error| error.to_string())?;
        let peer = keys
            .trust
            .verify_peer(initiator, received.payload().presented.clone(), now())
            .map_err(|error| error.to_string())?;
        let (transport, message) = received
            .answer(&peer, &keys.local(head), &mut rng())
            .map_err(|error| error.to_string())?;
        let (tunnel_id, message) = (request.tunnel_id, Blob(message));
        client.send(&FromAgent::AcceptTunnel { tunnel_id, message }).await;
        Self::over(hub, &ticket, transport).await
    }

    async fn over(hub: SocketAddr, ticket: &Ticket, transport: Transport) -> Result<Self, String> {
        let socket = data_socket(hub, ticket.reveal(), Encoding::Base64)
            .await
            .map_err(|status| format!("the data socket was refused: {status}"))?;
        let (sealer, opener) = transport.split();
        Ok(Self { socket, sealer, opener })
    }

    /// Sends a record.
    pub async fn send(&mut self, record: &Record<'_>) {
        self.send_bent(record, |_| {}).await;
    }

    /// Sends a record of which something was changed after it was sealed.
    pub async fn send_bent(&mut self, record: &Record<'_>, bend: impl FnOnce(&mut Vec<u8>)) {
        let mut packet = Vec::new();
        record.encode(&mut packet);
        self.sealer.seal(&mut packet, 0).expect("a new key");
        bend(&mut packet);
        let text = base64_simd::STANDARD_NO_PAD.encode_to_string(packet);
        // The other end may have closed already, which shows when it is read.
        let _ = self.socket.send(Message::text(text)).await;
    }

    /// The next record, not decoded; `None` when the tunnel is closed.
    pub async fn read(&mut self) -> Option<Vec<u8>> {
        loop {
            match timeout(PATIENCE, self.socket.next()).await.expect("it is closed, or goes on")? {
                Ok(Message::Text(text)) => {
                    let packet = base64_simd::STANDARD_NO_PAD.decode_to_vec(text.as_bytes());
                    let mut packet = packet.expect("base64");
                    return self.opener.open(&mut packet).ok().map(|record| record.to_vec());
                }
                Ok(Message::Ping(_) | Message::Pong(_)) => {}
                Ok(Message::Binary(_) | Message::Close(_) | Message::Frame(_)) | Err(_) => {
                    return None;
                }
            }
        }
    }
}
