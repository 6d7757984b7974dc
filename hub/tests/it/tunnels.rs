//! Opening tunnels, tickets, and bytes through the relay.

use std::{fs, net::SocketAddr, path::Path};

use connect_spec::{
    control::{ErrorCode, FromAgent, FromHub, Reply, Request, Ticket, TunnelRequest, close},
    encoding::Encoding,
    ids::{AgentId, ChannelId, CredentialId, LookupTag, ServiceId, TunnelId},
};
use futures_util::{
    SinkExt as _, StreamExt as _,
    stream::{SplitSink, SplitStream},
};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{
        self, Message,
        http::{HeaderValue, StatusCode, header},
        protocol::CloseFrame,
    },
};

use crate::{
    client::{Agent, Control, Dialer, Stream, Workspace, blob, expose},
    process::{HubProcess, run},
    template::place,
};

pub(crate) const SERVICE: ServiceId = ServiceId([0xd1; 16]);
pub(crate) const TAG: LookupTag = LookupTag([0xd2; 16]);

pub(crate) fn open(tunnel: u8, service_id: ServiceId, responder: AgentId) -> TunnelRequest {
    TunnelRequest {
        tunnel_id: TunnelId([tunnel; 16]),
        service_id,
        responder,
        share_id: CredentialId::NONE,
        channel_id: ChannelId([8; 16]),
        tunnel_no: 0,
        encoding: Encoding::Base64,
        message: blob(1500),
    }
}

/// A hub with an exposer and a reacher.
pub(crate) struct World {
    pub(crate) hub: HubProcess,
    pub(crate) dialer: Dialer,
    pub(crate) workspace: Workspace,
    pub(crate) exposer: Agent,
    pub(crate) reacher: Agent,
    pub(crate) exposing: Control,
    pub(crate) reaching: Control,
    next_tunnel: u8,
}

pub(crate) type Data = WebSocketStream<Stream>;

impl World {
    pub(crate) async fn start(data_dir: &Path) -> Self {
        let hub = HubProcess::start(data_dir).await;
        let dialer = Dialer::plain(hub.agents);
        Self::populate(hub, dialer, None).await
    }

    /// A hub off loopback, with a certificate of its own.
    async fn start_with_tls(data_dir: &Path) -> Self {
        let args = ["--listen", "0.0.0.0:0", "--public-url", "https://hub.example"];
        let hub = HubProcess::start_with(data_dir, &args, |_| ()).await;
        let certificate = fs::read(data_dir.join("tls.crt")).unwrap();
        let certificate = CertificateDer::from_pem_slice(&certificate).unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], hub.agents.port()));
        let token =
            run(&["registration-token", "create", "--data-dir", data_dir.to_str().unwrap()]).await;
        let token = String::from_utf8(token.stdout).unwrap();
        Self::populate(
            hub,
            Dialer::pinned(address, "hub.example:443", certificate),
            Some(token.trim()),
        )
        .await
    }

    pub(crate) async fn populate(hub: HubProcess, dialer: Dialer, token: Option<&str>) -> Self {
        let workspace = Workspace::new();
        let (exposer, reacher) = (workspace.founder(), workspace.founder());
        let (mut exposing, mut reaching) = (dialer.control().await, dialer.control().await);
        let create = workspace.create(token);
        let welcome = exposing.try_log_in(&exposer, |login| login.create = Some(create)).await;
        assert!(matches!(welcome, FromHub::Welcome { .. }), "{welcome:?}");
        let welcome = reaching.try_log_in(&reacher, |_| ()).await;
        assert!(matches!(welcome, FromHub::Welcome { .. }), "{welcome:?}");
        exposing.done(expose(SERVICE, TAG, 1)).await;
        Self { hub, dialer, workspace, exposer, reacher, exposing, reaching, next_tunnel: 0 }
    }

    /// Opens and accepts a tunnel: the reacher's and the exposer's tickets.
    pub(crate) async fn tickets(&mut self, encoding: Encoding) -> (Ticket, Ticket) {
        self.next_tunnel += 1;
        let request =
            TunnelRequest { encoding, ..open(self.next_tunnel, SERVICE, self.exposer.id) };
        let asked = self.reaching.ask(Request::OpenTunnel(request.clone())).await;
        let exposer_ticket = match self.exposing.receive().await {
            FromHub::IncomingTunnel { request: incoming, ticket, .. } => {
                assert_eq!(incoming, request);
                ticket
            }
            other => panic!("{other:?}"),
        };
        let accept = FromAgent::AcceptTunnel { tunnel_id: request.tunnel_id, message: blob(2600) };
        self.exposing.send(accept).await;
        match self.reaching.receive().await {
            FromHub::Reply { id, reply: Reply::TunnelAccepted { message, ticket } } => {
                assert_eq!((id, message), (asked, blob(2600)));
                (ticket, exposer_ticket)
            }
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn tunnel(&mut self, encoding: Encoding) -> (Data, Data) {
        let (reacher, exposer) = self.tickets(encoding).await;
        let subprotocol = encoding.subprotocol();
        let (reacher, exposer) = tokio::join!(
            dial(&self.dialer, Some(&reacher), subprotocol),
            dial(&self.dialer, Some(&exposer), subprotocol)
        );
        (reacher.unwrap(), exposer.unwrap())
    }
}

/// Opens a data socket, or gives the status of the refusal.
pub(crate) async fn dial(
    hub: &Dialer,
    ticket: Option<&Ticket>,
    subprotocol: &'static str,
) -> Result<Data, StatusCode> {
    let mut request = hub.request("/v1/tunnel");
    let headers = request.headers_mut();
    if let Some(ticket) = ticket {
        let value = HeaderValue::from_str(&format!("Ticket {}", ticket.reveal())).unwrap();
        headers.insert(header::AUTHORIZATION, value);
    }
    headers.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(subprotocol));
    match client_async(request, hub.dial().await).await {
        Ok((socket, response)) => {
            assert_eq!(response.headers()[header::SEC_WEBSOCKET_PROTOCOL], subprotocol);
            Ok(socket)
        }
        Err(tungstenite::Error::Http(response)) => Err(response.status()),
        Err(other) => panic!("{other}"),
    }
}

pub(crate) async fn expect_close(socket: &mut Data, code: u16) {
    match socket.next().await {
        Some(Ok(Message::Close(Some(frame)))) => assert_eq!(u16::from(frame.code), code),
        other => panic!("expected a close with {code}, got {other:?}"),
    }
}

#[tokio::test]
async fn both_encodings_carry_bytes_both_ways() {
    let (_dir, data_dir) = place().await;
    let mut world = World::start(&data_dir).await;
    for encoding in [Encoding::Base64, Encoding::Binary] {
        let (mut reacher, mut exposer) = world.tunnel(encoding).await;
        let message = |length: usize| match encoding {
            Encoding::Base64 => Message::text("A".repeat(length)),
            Encoding::Binary => Message::binary(vec![7; length]),
        };
        for length in [0, 1, 1000, 65_535, 87_380] {
            let (there, back) = (message(length), message(length + 1));
            let (sent, received) = tokio::join!(reacher.send(there.clone()), exposer.next());
            sent.unwrap();
            assert_eq!(received.unwrap().unwrap(), there);
            let (sent, received) = tokio::join!(exposer.send(back.clone()), reacher.next());
            sent.unwrap();
            assert_eq!(received.unwrap().unwrap(), back);
        }
        reacher.send(Message::Ping(b"x".to_vec().into())).await.unwrap();
        assert_eq!(reacher.next().await.unwrap().unwrap(), Message::Pong(b"x".to_vec().into()));
        let frame = CloseFrame { code: 4000.into(), reason: "done".into() };
        reacher.close(Some(frame.clone())).await.unwrap();
        assert_eq!(exposer.next().await.unwrap().unwrap(), Message::Close(Some(frame.clone())));
        assert!(exposer.next().await.is_none());
        assert_eq!(reacher.next().await.unwrap().unwrap(), Message::Close(Some(frame)));
        assert!(reacher.next().await.is_none());
    }
    world.hub.stop().await;
}

/// Sends and receives at once on both ends, in frames of every size.
async fn check_bulk(reacher: Data, exposer: Data) {
    const FRAMES: usize = 600;
    let frame = |number: usize| {
        let length = [0, 1, 125, 126, 5000, 43_700, 65_535, 65_536, 87_404, 131_072][number % 10];
        Message::binary(vec![u8::try_from(number % 251).unwrap(); length])
    };
    let (mut to_hub_r, mut from_hub_r) = reacher.split();
    let (mut to_hub_e, mut from_hub_e) = exposer.split();
    let send = async |to_hub: &mut SplitSink<Data, Message>| {
        for number in 0..FRAMES {
            to_hub.send(frame(number)).await.unwrap();
        }
    };
    let receive = async |from_hub: &mut SplitStream<Data>| {
        for number in 0..FRAMES {
            assert!(from_hub.next().await.unwrap().unwrap() == frame(number), "frame {number}");
        }
    };
    tokio::join!(
        send(&mut to_hub_r),
        send(&mut to_hub_e),
        receive(&mut from_hub_r),
        receive(&mut from_hub_e)
    );
}

#[tokio::test]
async fn bulk_both_ways_arrives_whole_in_plain_text_and_under_tls() {
    let (_dir, data_dir) = place().await;
    for tls in [false, true] {
        let mut world = match tls {
            false => World::start(&data_dir).await,
            true => World::start_with_tls(&data_dir).await,
        };
        let (reacher, exposer) = world.tunnel(Encoding::Binary).await;
        check_bulk(reacher, exposer).await;
        world.hub.stop().await;
    }
}

#[tokio::test]
async fn a_ticket_opens_one_door_once() {
    let (_dir, data_dir) = place().await;
    let mut world = World::start(&data_dir).await;
    let hub = &world.dialer.clone();
    let base64 = Encoding::Base64.subprotocol();
    let (reacher, exposer) = world.tickets(Encoding::Base64).await;
    assert_eq!(dial(hub, None, base64).await.err(), Some(StatusCode::UNAUTHORIZED));
    let guess = Ticket::new([1; 32]);
    assert_eq!(dial(hub, Some(&guess), base64).await.err(), Some(StatusCode::UNAUTHORIZED));
    assert_eq!(dial(hub, Some(&reacher), "chat").await.err(), Some(StatusCode::BAD_REQUEST));
    let _waiting = dial(hub, Some(&reacher), base64).await.unwrap();
    assert_eq!(dial(hub, Some(&reacher), base64).await.err(), Some(StatusCode::UNAUTHORIZED));
    assert_eq!(
        dial(hub, Some(&exposer), Encoding::Binary.subprotocol()).await.err(),
        Some(StatusCode::BAD_REQUEST)
    );
    world.hub.stop().await;
}

#[tokio::test]
async fn early_bytes_wait_for_the_other_end() {
    let (_dir, data_dir) = place().await;
    let mut world = World::start(&data_dir).await;
    let hub = &world.dialer.clone();
    let (reacher, exposer) = world.tickets(Encoding::Base64).await;
    let mut reacher = dial(hub, Some(&reacher), Encoding::Base64.subprotocol()).await.unwrap();
    for number in 0..10 {
        reacher.send(Message::text(format!("early{number}"))).await.unwrap();
    }
    let mut exposer = dial(hub, Some(&exposer), Encoding::Base64.subprotocol()).await.unwrap();
    for number in 0..10 {
        assert_eq!(exposer.next().await.unwrap().unwrap(), Message::text(format!("early{number}")));
    }
    world.hub.stop().await;
}

#[tokio::test]
async fn tunnels_outlive_the_control_sockets_and_end_with_their_peers() {
    let (_dir, data_dir) = place().await;
    let mut world = World::start(&data_dir).await;
    let (mut reacher, mut exposer) = world.tunnel(Encoding::Binary).await;
    let (other_reacher, mut other_exposer) = world.tunnel(Encoding::Binary).await;
    let World { hub, exposing, reaching, .. } = world;
    drop((exposing, reaching));
    reacher.send(Message::binary(vec![1])).await.unwrap();
    assert_eq!(exposer.next().await.unwrap().unwrap(), Message::binary(vec![1]));
    // One vanishes; its peer hears of it, the other tunnel does not.
    drop(other_reacher);
    expect_close(&mut other_exposer, close::PEER_GONE).await;
    // One breaks the protocol.
    exposer.send(Message::text("text in a binary tunnel")).await.unwrap();
    expect_close(&mut exposer, close::UNSUPPORTED).await;
    expect_close(&mut reacher, close::PEER_GONE).await;
    hub.stop().await;
}

#[tokio::test]
async fn other_ends_are_told_when_an_agent_has_moved() {
    let (_dir, data_dir) = place().await;
    let mut world = World::start(&data_dir).await;
    let (mut reacher, mut lost) = world.tunnel(Encoding::Binary).await;
    for moved in [false, true] {
        let mut control = Control::connect(world.hub.agents).await;
        let answer = control.try_log_in(&world.exposer, |login| login.moved = moved).await;
        assert!(matches!(answer, FromHub::Welcome { displaced: true, .. }), "{answer:?}");
        world.exposing = control;
        if !moved {
            // A login that says nothing of it leaves tunnels alone.
            reacher.send(Message::binary(vec![1])).await.unwrap();
            assert_eq!(lost.next().await.unwrap().unwrap(), Message::binary(vec![1]));
        }
    }
    expect_close(&mut reacher, close::PEER_GONE).await;
    world.hub.stop().await;
}

#[tokio::test]
async fn a_reacher_that_goes_before_it_came_is_not_waited_for() {
    let (_dir, data_dir) = place().await;
    let mut world = World::start(&data_dir).await;
    let (reacher, exposer) = world.tickets(Encoding::Base64).await;
    let hub = &world.dialer.clone();
    let base64 = Encoding::Base64.subprotocol();
    let mut exposer = dial(hub, Some(&exposer), base64).await.unwrap();
    world.reaching.socket.close(None).await.unwrap();
    expect_close(&mut exposer, close::PEER_GONE).await;
    assert_eq!(dial(hub, Some(&reacher), base64).await.err(), Some(StatusCode::UNAUTHORIZED));
    world.hub.stop().await;
}

#[tokio::test]
async fn a_hub_that_stops_tells_its_tunnels() {
    let (_dir, data_dir) = place().await;
    let mut world = World::start(&data_dir).await;
    let (mut reacher, mut exposer) = world.tunnel(Encoding::Base64).await;
    let (waiting, _) = world.tickets(Encoding::Base64).await;
    let mut waiting =
        dial(&world.dialer, Some(&waiting), Encoding::Base64.subprotocol()).await.unwrap();
    world.hub.signal(nix::sys::signal::Signal::SIGINT);
    for socket in [&mut reacher, &mut exposer, &mut waiting] {
        expect_close(socket, close::RESTARTING).await;
    }
    let (status, log) = world.hub.wait().await;
    assert!(status.success(), "{log}");
}

#[tokio::test]
async fn refusals_say_which() {
    let (_dir, data_dir) = place().await;
    let mut world = World::start(&data_dir).await;
    let exposer = world.exposer.id;

    let asked = world.reaching.ask(Request::OpenTunnel(open(1, SERVICE, exposer))).await;
    assert!(matches!(world.exposing.receive().await, FromHub::IncomingTunnel { .. }));
    let tunnel_id = TunnelId([1; 16]);
    world
        .exposing
        .send(FromAgent::RefuseTunnel { tunnel_id, code: ErrorCode::IssuerUnknown })
        .await;
    match world.reaching.receive().await {
        FromHub::Reply { id, reply: Reply::Error(report) } => {
            assert_eq!((id, report.code), (asked, ErrorCode::IssuerUnknown));
        }
        other => panic!("{other:?}"),
    }

    let unknown = open(2, ServiceId([0; 16]), exposer);
    assert_eq!(world.reaching.refused(Request::OpenTunnel(unknown)).await, ErrorCode::NotFound);
    let misdirected = open(3, SERVICE, AgentId([0; 16]));
    assert_eq!(world.reaching.refused(Request::OpenTunnel(misdirected)).await, ErrorCode::NotFound);
    let mut too_long = open(4, SERVICE, exposer);
    too_long.message = blob(connect_spec::limits::MAX_HANDSHAKE_BYTES + 1);
    assert_eq!(world.reaching.refused(Request::OpenTunnel(too_long)).await, ErrorCode::BadRequest);

    world.exposing.socket.close(None).await.unwrap();
    while world.exposing.socket.next().await.is_some() {}
    let gone = Request::OpenTunnel(open(5, SERVICE, exposer));
    assert_eq!(world.reaching.refused(gone).await, ErrorCode::Offline);
    world.hub.stop().await;
}

#[tokio::test]
async fn the_log_has_no_secrets_even_at_trace() {
    let (_dir, data_dir) = place().await;
    let mut world = World::start(&data_dir).await;
    let (reacher, exposer) = world.tickets(Encoding::Base64).await;
    let hub = &world.dialer.clone();
    let mut reacher_socket =
        dial(hub, Some(&reacher), Encoding::Base64.subprotocol()).await.unwrap();
    let mut exposer_socket =
        dial(hub, Some(&exposer), Encoding::Base64.subprotocol()).await.unwrap();
    reacher_socket.send(Message::text("c2VjcmV0cGF5bG9hZA")).await.unwrap();
    exposer_socket.next().await.unwrap().unwrap();
    drop((reacher_socket, exposer_socket));
    let log = world.hub.stop().await;
    assert!(log.contains("logged in"), "the log is empty: {log}");
    for secret in
        [reacher.reveal(), exposer.reveal(), "c2VjcmV0cGF5bG9hZA", "VVVVVV", &"55".repeat(20)]
    {
        assert!(!log.contains(secret), "{secret} in {log}");
    }
}
