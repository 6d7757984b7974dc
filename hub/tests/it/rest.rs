//! The REST interface: who may ask, what is answered, and that the document tells the truth about it.

use std::{
    net::SocketAddr,
    sync::LazyLock,
    time::{Duration, Instant},
};

use connect_hub::limits::{API_KEY_BURST, API_KEY_RATE};
use connect_spec::{
    audit::Scope,
    control::{ApiKey, ErrorCode, Reply, Request, close},
    encoding::Encoding,
    ids::{LookupTag, ServiceId},
    log::Change,
};
use http::StatusCode;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::sleep,
};

use crate::{
    client::{Control, Workspace, expose},
    template::place,
    tunnels::{SERVICE, World, expect_close},
};

static DOCUMENT: LazyLock<Value> =
    LazyLock::new(|| serde_json::from_str(include_str!("../../src/rest/openapi.json")).unwrap());

/// An answer.
#[derive(Debug)]
struct Answer {
    status: StatusCode,
    head: String,
    body: Value,
}

/// Asks once, and holds the answer against the document.
async fn call(hub: SocketAddr, method: &str, path: &str, key: Option<&ApiKey>) -> Answer {
    let authorization = key.map(|key| format!("Authorization: Bearer {}\r\n", key.reveal()));
    let authorization = authorization.unwrap_or_default();
    call_with(hub, method, path, &authorization).await
}

async fn call_with(hub: SocketAddr, method: &str, path: &str, headers: &str) -> Answer {
    let mut socket = TcpStream::connect(hub).await.unwrap();
    let request =
        format!("{method} {path} HTTP/1.1\r\nHost: hub\r\nConnection: close\r\n{headers}\r\n");
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    socket.read_to_string(&mut text).await.unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let body = if body.is_empty() { Value::Null } else { serde_json::from_str(body).unwrap() };
    let answer = Answer { status, head: head.to_ascii_lowercase(), body };
    check_documented(method, path, &answer);
    answer
}

/// The answer is one that the document has for the route.
fn check_documented(method: &str, path: &str, answer: &Answer) {
    let Answer { status, head, body } = answer;
    let path = path.split('?').next().unwrap();
    let route = match path.strip_prefix("/v1/tunnels/") {
        Some(id) if id.len() == 32 => "/v1/tunnels/{tunnel_id}",
        _ => path,
    };
    if method == "HEAD" {
        assert!(body.is_null() && status.is_success());
        return;
    }
    let operation = &DOCUMENT["paths"][route][method.to_ascii_lowercase()];
    if operation.is_null() {
        assert!(matches!(status.as_u16(), 404 | 405), "{method} {path}: {answer:?}");
        assert!(head.contains("content-type: application/problem+json"), "{head}");
        return;
    }
    let mut response = &operation["responses"][status.as_str()];
    assert!(!response.is_null(), "{method} {path}: {status} is not in the document");
    if let Some(place) = response["$ref"].as_str() {
        response = DOCUMENT.pointer(place.trim_start_matches('#')).unwrap();
    }
    let Some((media_type, content)) =
        response["content"].as_object().and_then(|content| content.iter().next())
    else {
        assert!(body.is_null());
        return;
    };
    assert!(head.contains(&format!("content-type: {media_type}")), "{head}");
    assert!(head.contains("cache-control: no-store"), "{head}");
    let mut schema = content["schema"].clone();
    schema["components"] = DOCUMENT["components"].clone();
    let validator = jsonschema::validator_for(&schema).unwrap();
    let errors: Vec<String> = validator
        .iter_errors(body)
        .map(|error| format!("{error} at {}", error.instance_path()))
        .collect();
    assert!(errors.is_empty(), "{method} {path}: {errors:?} in {body:#}");
    if !status.is_success() {
        assert_eq!(body["status"], status.as_u16());
    }
}

async fn new_key(control: &mut Control, scopes: &[Scope]) -> ApiKey {
    let create = Request::CreateApiKey { scopes: scopes.to_vec(), valid_for: 3600 };
    match control.request(create).await {
        Reply::ApiKeyCreated { key, .. } => key,
        other => panic!("{other:?}"),
    }
}

const ALL: [Scope; 3] = [Scope::Read, Scope::Audit, Scope::Write];

#[tokio::test]
async fn a_workspace_is_read_as_opaque_ids() {
    let (_dir, data_dir) = place().await;
    let mut world = World::start(&data_dir).await;
    let hub = world.hub.agents;
    let key = &new_key(&mut world.reaching, &ALL).await;
    let share = world.workspace.share(SERVICE);
    world.exposing.done(share.request()).await;
    world.exposing.done(world.workspace.invite(1, None).request()).await;
    let (_near, _far) = world.tunnel(Encoding::Base64).await;

    let services = call(hub, "GET", "/v1/services", Some(key)).await;
    assert_eq!(services.status, StatusCode::OK);
    assert_eq!(services.body["items"].as_array().unwrap().len(), 1);
    assert_eq!(services.body["items"][0]["service_id"], SERVICE.to_string());
    assert_eq!(services.body["items"][0]["online"], true);
    let agents = call(hub, "GET", "/v1/agents", Some(key)).await;
    assert_eq!(agents.body["items"].as_array().unwrap().len(), 2);
    assert_eq!(agents.body["items"][0]["role"], "member");
    let tunnels = call(hub, "GET", "/v1/tunnels", Some(key)).await;
    let tunnel = &tunnels.body["items"][0];
    assert_eq!(tunnel["agent_id"], world.reacher.id.to_string());
    assert_eq!(tunnel["peer_id"], world.exposer.id.to_string());
    // For more than a second, below the rate of the key, its age grows and its beginning stays.
    for _ in 0..24 {
        sleep(Duration::from_millis(50)).await;
        let again = call(hub, "GET", "/v1/tunnels", Some(key)).await;
        assert_eq!(again.body["items"][0]["opened_at"], tunnel["opened_at"]);
    }
    let shares = call(hub, "GET", "/v1/shares", Some(key)).await;
    assert_eq!(shares.body["items"].as_array().unwrap().len(), 1);
    assert_eq!(shares.body["items"][0]["share_id"], share.id().to_string());
    assert_eq!(shares.body["items"][0]["service_ids"], json!([SERVICE]));
    assert_eq!(shares.body["items"][0]["closed"], false);
    let closed = Change::CloseCredential { credential_id: share.id(), keep: Vec::new() };
    let entry = world.workspace.entry(world.workspace.head(), vec![closed]);
    assert_eq!(world.exposing.append(&[entry]).await, Reply::Done);
    let shares = call(hub, "GET", "/v1/shares", Some(key)).await;
    assert_eq!(shares.body["items"][0]["closed"], true);

    let audit = call(hub, "GET", "/v1/audit", Some(key)).await;
    let kinds: Vec<_> = audit.body["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["event"]["kind"].as_str().unwrap())
        .collect();
    assert_eq!(kinds[..3], ["workspace_created", "agent_enrolled", "agent_enrolled"]);
    let head = call(hub, "HEAD", "/v1/audit", Some(key)).await;
    assert_eq!((head.status, head.body), (StatusCode::OK, Value::Null));
    assert_eq!(call(hub, "GET", "/v1/openapi.json", None).await.body, *DOCUMENT);
    world.hub.stop().await;
}

#[tokio::test]
async fn lists_come_in_pages_and_filters_hold() {
    let (_dir, data_dir) = place().await;
    let mut world = World::start(&data_dir).await;
    let hub = world.hub.agents;
    let key = &new_key(&mut world.reaching, &ALL).await;
    for number in 0..6 {
        let id = [0x10 + number; 16];
        world.exposing.done(expose(ServiceId(id), LookupTag(id), 1)).await;
    }
    for (path, id, count) in
        [("/v1/services", "service_id", 7), ("/v1/agents", "agent_id", 2), ("/v1/audit", "seq", 11)]
    {
        let whole = call(hub, "GET", path, Some(key)).await;
        assert!(whole.body.get("next").is_none());
        let whole = whole.body["items"].as_array().unwrap().clone();
        assert_eq!(whole.len(), count, "{path}");
        for limit in [1, 2, 3, count, count + 1] {
            let mut pages = Vec::new();
            let mut cursor = String::new();
            loop {
                let page =
                    call(hub, "GET", &format!("{path}?limit={limit}{cursor}"), Some(key)).await;
                let items = page.body["items"].as_array().unwrap();
                assert!(items.len() <= limit);
                pages.extend(items.iter().map(|item| item[id].clone()));
                let Some(next) = page.body["next"].as_str() else { break };
                cursor = format!("&cursor={next}");
            }
            let ids: Vec<_> = whole.iter().map(|item| item[id].clone()).collect();
            assert_eq!(pages, ids, "{path} by {limit}");
        }
    }
    let audit = async |filter: &str| {
        let page = call(hub, "GET", &format!("/v1/audit?{filter}"), Some(key)).await;
        assert_eq!(page.status, StatusCode::OK, "{filter}");
        page.body["items"].as_array().unwrap().clone()
    };
    assert_eq!(audit("kind=service_exposed").await.len(), 7);
    assert_eq!(audit("kind=service_exposed&limit=2").await.len(), 2);
    assert_eq!(audit(&format!("agent_id={}", world.reacher.id)).await.len(), 2);
    let all = audit("").await;
    let at = |row: &Value| row["event"]["at"].as_u64().unwrap();
    let middle = at(&all[5]);
    assert!(audit(&format!("since={middle}")).await.iter().all(|row| at(row) >= middle));
    assert!(audit(&format!("until={middle}")).await.iter().all(|row| at(row) <= middle));
    assert_eq!(audit(&format!("since={}", at(&all[10]) + 1)).await.len(), 0);

    assert_eq!(audit("until=999999999999999&cursor=0").await.len(), 11);
    assert_eq!(audit("cursor=999999999999999").await.len(), 0);

    for wrong in [
        "limit=0",
        "limit=501",
        "limit=-1",
        "limit=x",
        "limit=1&limit=2",
        "cursor=-1",
        "cursor=99999999999999999999",
        "kinds=x",
        "since=soon",
        "agent_id=1",
        "agent_id=",
        "%zz=%",
        "=",
        "&",
        "limit",
        "limit=%2B1",
        "limit=01",
        "cursor=%2B1",
        "since=-0",
        "until=1e3",
        "until=1000000000000000",
        "cursor=1000000000000000",
        "kind=",
        "kind=A",
        "kind=%00",
        "kind=%FF",
        &format!("kind={}", "k".repeat(65)),
    ] {
        let answer = call(hub, "GET", &format!("/v1/audit?{wrong}"), Some(key)).await;
        let expected = if wrong == "&" { StatusCode::OK } else { StatusCode::BAD_REQUEST };
        assert_eq!(answer.status, expected, "{wrong}");
    }
    for wrong in ["cursor=1", "cursor=", &format!("cursor={}", "f".repeat(33)), "kind=x"] {
        let answer = call(hub, "GET", &format!("/v1/services?{wrong}"), Some(key)).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{wrong}");
    }
    world.hub.stop().await;
}

#[tokio::test]
async fn a_key_opens_what_it_is_for_and_as_long_as_its_maker_is_a_member() {
    let (_dir, data_dir) = place().await;
    let mut world = World::start(&data_dir).await;
    let hub = world.hub.agents;
    let status = async |path: &str, key: &ApiKey| call(hub, "GET", path, Some(key)).await.status;

    let read = new_key(&mut world.reaching, &[Scope::Read]).await;
    let audit = new_key(&mut world.reaching, &[Scope::Audit]).await;
    assert_eq!(status("/v1/services", &read).await, StatusCode::OK);
    assert_eq!(status("/v1/audit", &read).await, StatusCode::FORBIDDEN);
    assert_eq!(status("/v1/services", &audit).await, StatusCode::FORBIDDEN);
    assert_eq!(status("/v1/audit", &audit).await, StatusCode::OK);
    let tunnel = format!("/v1/tunnels/{}", "0".repeat(32));
    assert_eq!(call(hub, "DELETE", &tunnel, Some(&read)).await.status, StatusCode::FORBIDDEN);

    // No key, no such key, and what is no key.
    let none = call(hub, "GET", "/v1/services", None).await;
    assert_eq!(none.status, StatusCode::UNAUTHORIZED);
    assert!(none.head.contains("www-authenticate: bearer"), "{}", none.head);
    assert_eq!(status("/v1/services", &ApiKey::new([9; 32])).await, StatusCode::UNAUTHORIZED);
    for wrong in [
        "Authorization: Bearer\r\n".to_owned(),
        format!("Authorization: Basic {}\r\n", read.reveal()),
        format!("Authorization: Bearer {}\r\n", read.reveal().to_uppercase()),
        format!("Authorization: Bearer {}0\r\n", read.reveal()),
        "Authorization: Bearer pck_' OR true --\r\n".to_owned(),
    ] {
        let answer = call_with(hub, "GET", "/v1/services", &wrong).await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{wrong}");
    }

    // Made within limits.
    for (scopes, valid_for) in
        [(vec![], 60), (vec![Scope::Read], 0), (vec![Scope::Read], 400 * 24 * 3600)]
    {
        let refused = world.reaching.refused(Request::CreateApiKey { scopes, valid_for }).await;
        assert_eq!(refused, ErrorCode::BadRequest);
    }
    let short = Request::CreateApiKey { scopes: vec![Scope::Read], valid_for: 1 };
    let Reply::ApiKeyCreated { key: short, .. } = world.reaching.request(short).await else {
        panic!("a key of a second");
    };
    loop {
        match status("/v1/services", &short).await {
            StatusCode::UNAUTHORIZED => break,
            answer => {
                assert!(matches!(answer, StatusCode::OK | StatusCode::TOO_MANY_REQUESTS));
            }
        }
    }

    // Listed by every member, without the key; when it was used is known.
    let Reply::ApiKeys { keys } = world.exposing.request(Request::ApiKeys).await else {
        panic!("members list keys");
    };
    assert_eq!(keys.len(), 3);
    assert_eq!(keys[0].scopes, [Scope::Read]);
    assert!(keys.iter().all(|key| key.last_used_at.is_some() && key.agent_id == world.reacher.id));
    // Revoked at once, once.
    let key_id = keys[0].key_id;
    world.exposing.done(Request::RevokeApiKey { key_id }).await;
    assert_eq!(world.exposing.refused(Request::RevokeApiKey { key_id }).await, ErrorCode::NotFound);
    assert_eq!(status("/v1/services", &read).await, StatusCode::UNAUTHORIZED);
    // With its maker all of its keys end.
    let revoked = Change::RevokeAgent { agent_id: world.reacher.id, below_serial: None };
    let entry = world.workspace.entry(world.workspace.head(), vec![revoked]);
    assert_eq!(world.exposing.append(&[entry]).await, Reply::Done);
    assert_eq!(status("/v1/audit", &audit).await, StatusCode::UNAUTHORIZED);

    // A guest has nothing to do with them.
    let share = world.workspace.share(SERVICE);
    world.exposing.done(share.request()).await;
    let guest = world.workspace.joiner(&share);
    let mut guest = Control::log_in(hub, &world.workspace, &guest).await;
    let create = Request::CreateApiKey { scopes: vec![Scope::Read], valid_for: 60 };
    for request in [create, Request::ApiKeys, Request::RevokeApiKey { key_id }] {
        assert_eq!(guest.refused(request).await, ErrorCode::Forbidden);
    }
    world.hub.stop().await;
}

#[tokio::test]
async fn a_tunnel_is_cut_by_those_who_may_and_only_in_their_workspace() {
    let (_dir, data_dir) = place().await;
    let mut world = World::start(&data_dir).await;
    let hub = world.hub.agents;
    let key = new_key(&mut world.reaching, &ALL).await;
    let other = Workspace::new();
    let stranger = other.founder();
    let mut stranger = Control::log_in(hub, &other, &stranger).await;
    let foreign = new_key(&mut stranger, &ALL).await;

    let (mut near, mut far) = world.tunnel(Encoding::Base64).await;
    let id = format!("/v1/tunnels/{}", "01".repeat(16));
    let nowhere = format!("/v1/tunnels/{}", "02".repeat(16));
    let refused = call(hub, "DELETE", &id, Some(&foreign)).await;
    let unknown = call(hub, "DELETE", &nowhere, Some(&foreign)).await;
    assert_eq!((refused.status, refused.body), (StatusCode::NOT_FOUND, unknown.body));
    for path in ["/v1/services", "/v1/tunnels", "/v1/shares"] {
        assert_eq!(call(hub, "GET", path, Some(&foreign)).await.body, json!({ "items": [] }));
    }
    assert_eq!(call(hub, "DELETE", &id, Some(&key)).await.status, StatusCode::NO_CONTENT);
    expect_close(&mut near, close::CUT).await;
    expect_close(&mut far, close::CUT).await;
    assert_eq!(call(hub, "DELETE", &id, Some(&key)).await.status, StatusCode::NOT_FOUND);
    // Both in the log, the cut and what came of it.
    for (kind, reason) in [("tunnel_closed", json!("cut")), ("tunnel_cut", Value::Null)] {
        loop {
            let rows = call(hub, "GET", &format!("/v1/audit?kind={kind}"), Some(&key)).await;
            if let Some(row) = rows.body["items"].as_array().and_then(|rows| rows.first()) {
                assert_eq!(row["event"]["reason"], reason);
                break;
            }
        }
    }
    world.hub.stop().await;
}

#[tokio::test]
async fn what_is_not_there_and_too_much_have_their_answers() {
    let (_dir, data_dir) = place().await;
    let mut world = World::start(&data_dir).await;
    let hub = world.hub.agents;
    let key = new_key(&mut world.reaching, &ALL).await;
    for path in [
        "/",
        "/v1",
        "/v1/",
        "/v2/services",
        "/v1/service",
        "/v1/tunnels/1",
        "/v1/tunnels/",
        "/v1/services/",
    ] {
        assert_eq!(
            call(hub, "GET", path, Some(&key)).await.status,
            StatusCode::NOT_FOUND,
            "{path}"
        );
    }
    for (method, path, allow) in [
        ("POST", "/v1/services", "get, head"),
        ("DELETE", "/v1/tunnels", "get, head"),
        ("GET", &format!("/v1/tunnels/{}", "0".repeat(32)), "delete"),
        ("PUT", "/v1/openapi.json", "get, head"),
    ] {
        let answer = call(hub, method, path, Some(&key)).await;
        assert_eq!(answer.status, StatusCode::METHOD_NOT_ALLOWED, "{method} {path}");
        assert!(answer.head.contains(&format!("allow: {allow}")), "{}", answer.head);
    }
    // One key asks for too much; another one does not notice.
    let (mut answered, mut limited) = (0_u32, None);
    let since = Instant::now();
    while limited.is_none() && answered < 2000 {
        let answer = call(hub, "GET", "/v1/tunnels", Some(&key)).await;
        match answer.status {
            StatusCode::OK => answered += 1,
            StatusCode::TOO_MANY_REQUESTS => limited = Some(answer),
            other => panic!("{other}"),
        }
    }
    let most = f64::from(API_KEY_BURST) + f64::from(API_KEY_RATE) * since.elapsed().as_secs_f64();
    assert!(f64::from(answered) <= most + 1.0, "{answered} answers, and {most} are allowed");
    // A machine that is too slow to reach the rate sees no more of it.
    if let Some(limited) = limited {
        assert!(limited.head.contains("retry-after: 1"), "{}", limited.head);
        let other = new_key(&mut world.reaching, &ALL).await;
        assert_eq!(call(hub, "GET", "/v1/tunnels", Some(&other)).await.status, StatusCode::OK);
    }
    world.hub.stop().await;
}
