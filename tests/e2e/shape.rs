//! What programs read: the JSON of the command line, whose fields are promised.

use connect_tests::{home::Pair, hub::Hub, random_word, services::Service};
use serde_json::Value;

/// The fields of an object, sorted.
fn fields(value: &Value) -> Vec<&str> {
    let mut fields: Vec<_> =
        value.as_object().expect("an object").keys().map(String::as_str).collect();
    fields.sort_unstable();
    fields
}

#[track_caller]
fn check_fields(value: &Value, promised: &[&str]) {
    let fields = fields(value);
    for field in promised {
        assert!(fields.contains(field), "`{field}` is not among {fields:?}");
    }
}

#[test]
fn json_has_the_promised_fields() {
    let pair = Pair::start(Hub::shared());
    let service = Service::echo();
    let name = format!("svc-{}", random_word());
    let address = pair.carry(service.address(), &name);

    let status = pair.exposer().json(&["status"]);
    let promised =
        ["agent_id", "label", "workspace_id", "hub", "connected", "trust", "exposed", "reached"];
    check_fields(&status, &promised);
    check_fields(&status["trust"], &["seq", "head", "beat_age_s", "frozen"]);
    check_fields(&status["exposed"][0], &["name", "target", "service_id", "streams"]);
    assert_eq!(status["workspace_id"], pair.workspace.id.as_str());
    assert_eq!(status["exposed"][0]["target"], service.address().to_string());

    let status = pair.reacher.json(&["status"]);
    check_fields(&status["reached"][0], &["name", "address", "active", "rtt_ms", "streams"]);
    assert_eq!(status["reached"][0]["address"], address.to_string());
    assert!(status["reached"][0]["rtt_ms"].as_f64().expect("a number") > 0.0);

    let services = pair.reacher.json(&["services"]);
    let promised = ["name", "service_id", "agent", "label", "online", "protocol", "target_ok"];
    check_fields(&services[0], &promised);
    assert_eq!(services[0]["label"], "founder");
    assert_eq!(services[0]["target_ok"], true);

    let agents = pair.reacher.json(&["agents"]);
    for agent in agents.as_array().expect("a list") {
        check_fields(agent, &["agent_id", "label", "role", "tags", "online", "revoked"]);
        assert_eq!(agent["role"], "member");
        assert_eq!(agent["online"], true);
    }
    let again = pair.reacher.json(&["reach", &name]);
    assert_eq!(again["address"], address.to_string(), "reaching twice is reaching once");
}

#[test]
fn labels_are_made_unique_for_everybody_alike() {
    let pair = Pair::start(Hub::shared());
    let _others = [pair.workspace.join("web"), pair.workspace.join("web")];
    let labels = |agents: Value| -> Vec<String> {
        let agents = agents.as_array().expect("a list").iter();
        agents.map(|agent| agent["label"].as_str().expect("text").to_owned()).collect()
    };
    let seen = labels(pair.reacher.json(&["agents"]));
    assert_eq!(seen, ["founder", "reacher", "web", "web-2"]);
    assert_eq!(labels(pair.exposer().json(&["agents"])), seen);
}

#[test]
fn more_services_and_agents_than_fit_a_page_are_all_listed() {
    let pair = Pair::start(Hub::shared());
    let service = Service::echo();
    let target = service.address().to_string();
    for number in 0..40 {
        pair.exposer().ok(&["expose", &target, "--name", &format!("svc-{number:02}")]);
    }
    let listed = pair.reacher.json(&["services"]);
    let names: Vec<_> =
        listed.as_array().expect("a list").iter().map(|s| s["name"].as_str()).collect();
    let expected: Vec<_> = (0..40).map(|number| format!("svc-{number:02}")).collect();
    assert_eq!(names, expected.iter().map(|name| Some(name.as_str())).collect::<Vec<_>>());
}
