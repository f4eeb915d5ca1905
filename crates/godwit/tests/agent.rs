//! The agent from outside: its API, its command line, machines (QEMU without a guest), and what it refuses to peers.

mod host;
mod hostile;
mod metrics;
mod service;
mod unfit;

use std::{fs, process::Command};

use host::{Host, Site, eventually, free_port, kill_pid, run};
use serde_json::{Value, json};

#[test]
fn every_described_route_is_answered() {
    let site = Site::new();
    let host = site.host("hosta", 0, "");
    let (status, description) = host.http("GET", "/v1/openapi.json", "");
    assert_eq!(status, 200);
    let mut routes = 0;
    for (path, operations) in description["paths"].as_object().unwrap() {
        let path = path.replace("{name}", "nobody").replace("{id}", "0123456789abcdef");
        for method in operations.as_object().unwrap().keys() {
            let (status, body) = host.http(&method.to_uppercase(), &path, "{}");
            let message = body["message"].as_str().unwrap_or_default();
            assert!(
                !message.starts_with(&format!("there is no {}", method.to_uppercase())),
                "{method} {path}"
            );
            assert!(status == 200 || body["code"].is_string(), "{method} {path}: {status} {body}");
            routes += 1;
        }
    }
    assert!(routes >= 15, "{routes}");
}

#[test]
fn errors_are_objects_with_the_right_status() {
    let site = Site::new();
    let host = site.host("hosta", 0, "");
    for (method, path, body, status, code) in [
        ("GET", "/nowhere", "", 404, "not_found"),
        ("DELETE", "/v1/machines", "", 404, "not_found"),
        ("GET", "/v1/machines/..%2f..", "", 404, "not_found"),
        ("GET", "/v1/migrations/..%2f..", "", 404, "not_found"),
        ("POST", "/v1/machines", "not json", 400, "invalid"),
        ("POST", "/v1/machines", r#"{"spec":{"name":"../x","memory":"16M"}}"#, 400, "invalid"),
        ("POST", "/v1/migrations", r#"{"machine":"web1","to":"b","options":{"speed":9}}"#, 400, "invalid"),
        ("POST", "/v1/adoptions", r#"{"qmp":"/nonexistent","name":null}"#, 400, "invalid"),
    ] {
        let (got, body_got) = host.http(method, path, body);
        assert_eq!((got, body_got["code"].as_str()), (status, Some(code)), "{method} {path}: {body_got}");
    }
}

#[test]
fn exit_codes_are_a_promise() {
    let site = Site::new();
    let host = site.host("hosta", 0, "");
    assert_eq!(run(&["migrate"]).code, 2);
    run(&["--socket", "/nonexistent/s", "vm", "ls"]).fails(5, "no agent answers at /nonexistent/s");
    host.godwit(&["vm", "show", "nobody"]).fails(4, "no machine called nobody");
    host.godwit(&["migrate", "nobody", "--to", "hostb"]).fails(4, "no machine called nobody");
    host.godwit(&["cancel", "nobody"]).fails(4, "no migration nobody");
    let spec = host.spec("web1", "memroy = \"1G\"");
    host.godwit(&["vm", "run", &spec]).fails(2, "web1.toml:5: memroy");
    let config = host.config.display().to_string();
    run(&["agent", "--config", &config]).fails(3, "another agent uses");
    fs::write(site.path("bad.toml"), "name = \"hosta\"\nlisten = 5\n").unwrap();
    run(&["agent", "--check", "--config", &site.path("bad.toml").display().to_string()])
        .fails(2, "bad.toml:2: `listen`");
    assert_eq!(run(&["agent", "--check", "--config", &config]).code, 0);
}

#[test]
fn a_machine_lives_without_its_agent() {
    let site = Site::new();
    let mut host = site.host("hosta", 0, "");
    let spec = host.spec("web1", "");
    let machine = host.godwit(&["vm", "run", &spec]).succeeds();
    assert_eq!(machine["state"], "running");
    assert!(machine["spec"]["machine"].as_str().unwrap().starts_with("pc-i440fx-"), "{machine}");
    host.godwit(&["vm", "run", &spec]).fails(3, "web1 runs already");
    host.godwit(&["vm", "rm", "web1"]).fails(3, "web1 runs already");
    host.godwit(&["migrate", "web1", "--to", "hostz"]).fails(4, "hostz");

    host.crash();
    host.start();
    let listed = host.godwit(&["vm", "ls"]).succeeds();
    assert_eq!((&listed[0]["pid"], &listed[0]["state"]), (&machine["pid"], &json!("running")));

    host.godwit(&["vm", "stop", "web1", "--timeout", "100ms"]).fails(1, "godwit vm kill web1");
    assert_eq!(host.godwit(&["vm", "kill", "web1"]).succeeds()["state"], "off");
    host.godwit(&["vm", "kill", "web1"]).fails(3, "web1 is off");
    host.godwit(&["vm", "rm", "web1"]).succeeds();
    assert_eq!(host.godwit(&["vm", "ls"]).succeeds(), json!([]));
    assert_eq!(fs::read_dir(host.state().join("machines")).unwrap().count(), 0);
}

#[test]
fn a_machine_that_dies_is_noticed() {
    let site = Site::new();
    let host = site.host("hosta", 0, "");
    let machine = host.godwit(&["vm", "run", &host.spec("web1", "")]).succeeds();
    kill_pid(machine["pid"].as_i64().unwrap());
    eventually("the machine is off", || host.machine("web1", "state") == "off");
    eventually("its process is forgotten", || !host.state().join("machines/web1/process.json").exists());
    host.godwit(&["vm", "run", &host.spec("web1", "")]).succeeds();
}

/// As an agent leaves it that dies after it has started QEMU: before it has noted the process, or after that and before it
/// has started the worker.
#[test]
fn what_never_arrived_is_removed_by_the_next_agent() {
    let site = Site::new();
    let mut host = site.host("hosta", 0, "");
    for is_noted in [false, true] {
        let machine = host.godwit(&["vm", "run", &host.spec("web1", "")]).succeeds();
        kill_pid(machine["pid"].as_i64().unwrap());
        let directory = host.state().join("machines/web1");
        eventually("its process is forgotten", || !directory.join("process.json").exists());
        host.crash();
        let mut qemu = Command::new("qemu-system-x86_64")
            .args(["-machine", "pc", "-accel", "tcg", "-m", "16", "-nodefaults", "-display", "none", "-S"])
            .args(["-incoming", "defer", "-pidfile"])
            .arg(directory.join("qemu.pid"))
            .spawn()
            .unwrap();
        eventually("QEMU is up", || directory.join("qemu.pid").exists());
        fs::write(directory.join("starting.json"), json!({ "taps": [], "incoming": true }).to_string())
            .unwrap();
        if is_noted {
            let stat = fs::read_to_string(format!("/proc/{}/stat", qemu.id())).unwrap();
            let started = stat.rsplit(')').next().unwrap().split_whitespace().nth(19).unwrap();
            let process = json!({ "pid": qemu.id(), "started_ticks": started.parse::<u64>().unwrap() });
            let running = json!({ "process": process, "taps": [], "adopted_qmp": null });
            fs::write(directory.join("process.json"), running.to_string()).unwrap();
        }
        host.start();
        eventually("nothing is left", || host.http("GET", "/v1/machines", "").1 == json!([]));
        qemu.wait().unwrap();
    }
}

/// The same for a machine of this host: it is off, and can be started.
#[test]
fn a_start_that_was_cut_short_is_undone_by_the_next_agent() {
    let site = Site::new();
    let mut host = site.host("hosta", 0, "");
    let spec = host.spec("web1", "");
    let machine = host.godwit(&["vm", "run", &spec]).succeeds();
    host.crash();
    let directory = host.state().join("machines/web1");
    fs::rename(directory.join("process.json"), host.state().join("elsewhere")).unwrap();
    fs::write(directory.join("starting.json"), json!({ "taps": [], "incoming": false }).to_string()).unwrap();
    host.start();
    let process = format!("/proc/{}", machine["pid"]);
    eventually("its QEMU is ended", || !std::path::Path::new(&process).exists());
    eventually("it is off", || host.machine("web1", "state") == "off");
    host.godwit(&["vm", "run", &spec]).succeeds();
}

/// Files become whole under another name; an agent or a worker that is killed in the middle leaves that.
#[test]
fn what_was_just_being_written_is_swept_by_the_next_agent() {
    let site = Site::new();
    let mut host = site.host("hosta", 0, "");
    host.godwit(&["vm", "run", &host.spec("web1", "")]).succeeds();
    host.crash();
    let half = [
        "machines/web1/token-written.json.new",
        "machines/web1/spec.new",
        "migrations/5f2c9e01a7b3d846/job.new",
    ];
    let half = half.map(|file| host.state().join(file));
    for file in &half {
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, "{").unwrap();
    }
    host.start();
    assert!(half.iter().all(|file| !file.exists()));
    assert_eq!(fs::read_dir(host.state().join("migrations")).unwrap().count(), 0);
    assert_eq!(host.machine("web1", "state"), "running");
}

#[test]
fn what_qemu_refuses_is_said_in_one_line_and_leaves_nothing() {
    let site = Site::new();
    let host = site.host("hosta", 0, "");
    let spec = host.spec("web1", "[[disk]]\npath = \"/nonexistent/disk.raw\"");
    host.godwit(&["vm", "run", &spec]).fails(1, "/nonexistent/disk.raw");
    assert_eq!(fs::read_dir(host.state().join("machines")).unwrap().count(), 0);
}

#[test]
fn qemu_cannot_trace() {
    let site = Site::new();
    let host = site.host("hosta", 0, "");
    let machine = host.godwit(&["vm", "run", &host.spec("web1", "")]).succeeds();
    let status = fs::read_to_string(format!("/proc/{}/status", machine["pid"])).unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    const SYS_PTRACE: u32 = 19;
    assert_eq!(u64::from_str_radix(effective.trim(), 16).unwrap() >> SYS_PTRACE & 1, 0);
}

#[test]
fn a_machine_goes_there_and_back_and_is_never_started_twice() {
    let site = Site::new();
    let (a, b) = pair(&site, "may_send = true\nmay_receive = true", "may_send = true\nmay_receive = true");
    let spec = a.spec("web1", "");
    a.godwit(&["vm", "run", &spec]).succeeds();

    let report = a.godwit(&["migrate", "web1", "--to", "hostb", "--verify", "full"]).succeeds();
    assert_eq!((&report["outcome"], &report["machine_is_at"]), (&json!("completed"), &json!("hostb")));
    assert_eq!((b.machine("web1", "state"), b.machine("web1", "at")), (json!("running"), json!("hostb")));
    assert_eq!((a.machine("web1", "state"), a.machine("web1", "at")), (json!("off"), json!("hostb")));
    a.godwit(&["vm", "run", &spec]).fails(3, "web1 was given to hostb");
    a.godwit(&["migrate", "web1", "--to", "hostb"]).fails(3, "web1 was given to hostb");

    b.godwit(&["migrate", "web1", "--to", "hosta"]).succeeds();
    assert_eq!((a.machine("web1", "state"), a.machine("web1", "at")), (json!("running"), json!("hosta")));
    b.godwit(&["vm", "run", &spec]).fails(3, "web1 was given to hosta");
    let migrations = a.godwit(&["status"]).succeeds();
    assert_eq!(migrations.as_array().unwrap().len(), 2);
    assert_eq!((&migrations[0]["role"], &migrations[1]["role"]), (&json!("target"), &json!("source")));
}

#[test]
fn a_cancelled_migration_leaves_the_machine_where_it_was() {
    let site = Site::new();
    let (mut a, b) = pair(&site, "may_receive = true", "may_send = true");
    let before = a.godwit(&["vm", "run", &a.spec("web1", "")]).succeeds();
    let migration =
        a.godwit(&["migrate", "web1", "--to", "hostb", "--bandwidth", "1kbit", "--detach"]).succeeds();
    let id = migration["id"].as_str().unwrap();
    a.godwit(&["vm", "kill", "web1"]).fails(3, "web1 is busy: it migrates to hostb");

    // The worker goes on without the agent, and the next agent finds it.
    a.crash();
    a.start();
    a.godwit(&["migrate", "web1", "--to", "hostb"]).fails(3, "web1 is busy");
    a.godwit(&["set-bandwidth", "web1", "2kbit"]).succeeds();
    a.godwit(&["cancel", id]).succeeds();
    let last = a.godwit(&["status", id, "--watch"]);
    assert_eq!(last.code, 7, "{last:?}");
    a.godwit(&["cancel", id]).fails(3, "is over");
    assert_eq!(
        (a.machine("web1", "state"), a.machine("web1", "pid")),
        (json!("running"), before["pid"].clone())
    );
    eventually("nothing is left at the target", || b.http("GET", "/v1/machines", "").1 == json!([]));
}

#[test]
fn peers_get_only_what_is_written() {
    let site = Site::new();
    let receive = "may_receive = true";
    for (at_b, spec, reason) in [
        (None, "", "hostb refuses: hosta isn't among [peers]"),
        (Some(""), "", "hostb refuses: machines of hosta aren't accepted"),
        (Some("may_send = true"), "[[disk]]\npath = \"DISK\"", "hostb refuses: "),
        (Some("may_send = true"), "extra = [\"-device\", \"virtio-rng-pci\"]", "hostb refuses: "),
    ] {
        let (a, b) = match at_b {
            Some(rights) => pair(&site, receive, rights),
            None => strangers(&site, receive),
        };
        let disk = site.path("disk.raw");
        fs::write(&disk, [0; 512]).unwrap();
        let spec = a.spec("web1", &spec.replace("DISK", &disk.display().to_string()));
        a.godwit(&["vm", "run", &spec]).succeeds();
        a.godwit(&["migrate", "web1", "--to", "hostb"]).fails(3, reason);
        assert_eq!(a.machine("web1", "state"), "running");
        assert_eq!(b.http("GET", "/v1/machines", "").1, json!([]));
        assert_eq!(a.http("GET", "/v1/migrations", "").1, json!([]));
        assert_eq!(fs::read_dir(b.state().join("migrations")).unwrap().count(), 0);
        a.godwit(&["vm", "kill", "web1"]).succeeds();
        drop((a, b));
        for name in ["hosta", "hostb"] {
            for suffix in ["", ".id", ".bundle"] {
                let path = site.path(&format!("{name}{suffix}"));
                let _ = fs::remove_dir_all(&path).or_else(|_| fs::remove_file(&path));
            }
        }
    }
}

#[test]
fn a_host_of_another_authority_is_no_peer() {
    let (site, elsewhere) = (Site::new(), Site::new());
    let port = free_port();
    let _b = site.host("hostb", port, &peer("hosta", 1, "may_send = true"));
    let a = elsewhere.host("hosta", 0, &peer("hostb", port, "may_receive = true"));
    a.godwit(&["vm", "run", &a.spec("web1", "")]).succeeds();
    a.godwit(&["migrate", "web1", "--to", "hostb"]).fails(3, "can't reach hostb");
    assert_eq!(a.machine("web1", "state"), "running");
}

#[test]
fn the_target_must_have_room() {
    let site = Site::new();
    let ports = [free_port(), free_port()];
    let a = site.host("hosta", ports[0], &peer("hostb", ports[1], "may_receive = true"));
    let mut b = site.host("hostb", ports[1], &peer("hosta", ports[0], "may_send = true"));
    let config = fs::read_to_string(&b.config).unwrap().replace("\"1M\"", "\"1000T\"");
    b.crash();
    fs::write(&b.config, config).unwrap();
    b.start();
    a.godwit(&["vm", "run", &a.spec("web1", "")]).succeeds();
    a.godwit(&["migrate", "web1", "--to", "hostb"]).fails(3, "are free");
    let spec = b.spec("web1", "");
    b.godwit(&["vm", "run", &spec]).succeeds();
    a.godwit(&["migrate", "web1", "--to", "hostb"]).fails(3, "web1 runs already");
}

#[test]
fn an_adopted_machine_is_listed_and_let_go() {
    let site = Site::new();
    let host = site.host("hosta", 0, "");
    let qmp = site.path("own.qmp");
    let mut qemu = Command::new("qemu-system-x86_64")
        .args([
            "-name",
            "own",
            "-machine",
            "pc",
            "-accel",
            "tcg",
            "-m",
            "16",
            "-nodefaults",
            "-display",
            "none",
        ])
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", qmp.display()))
        .spawn()
        .unwrap();
    eventually("QEMU listens", || qmp.exists());
    let machine = host.godwit(&["vm", "adopt", "--qmp", &qmp.display().to_string()]).succeeds();
    assert_eq!((&machine["name"], &machine["adopted"]), (&json!("own"), &Value::Bool(true)));
    assert_eq!(machine["pid"], qemu.id());
    host.godwit(&["vm", "adopt", "--qmp", &qmp.display().to_string()]).fails(3, "own");
    host.godwit(&["vm", "rm", "own"]).succeeds();
    assert!(qemu.try_wait().unwrap().is_none(), "letting go doesn't end it");
    qemu.kill().unwrap();
    qemu.wait().unwrap();
}

fn pair(site: &Site, at_a: &str, at_b: &str) -> (Host, Host) {
    let ports = [free_port(), free_port()];
    let a = site.host("hosta", ports[0], &peer("hostb", ports[1], at_a));
    let b = site.host("hostb", ports[1], &peer("hosta", ports[0], at_b));
    (a, b)
}

/// The second host doesn't know the first.
fn strangers(site: &Site, at_a: &str) -> (Host, Host) {
    let port = free_port();
    (site.host("hosta", 0, &peer("hostb", port, at_a)), site.host("hostb", port, ""))
}

fn peer(name: &str, port: u16, rights: &str) -> String {
    format!("[peers.{name}]\naddress = \"127.0.0.1:{port}\"\n{rights}\n")
}
