use super::*;

const WEB1: &str = r#"name = "web1"
memory = "512M"
vcpus = 2

[[net]]
bridge = "br0"

[[disk]]
path = "/srv/vm/web1.qcow2"
format = "qcow2"
"#;

fn error(text: &str) -> String {
    Spec::from_toml(text, "web1.toml").unwrap_err().to_string()
}

fn web1(replace: &str, with: &str) -> String {
    assert!(WEB1.contains(replace), "{replace}");
    WEB1.replace(replace, with)
}

#[test]
fn what_is_left_out_has_a_default() {
    let spec = Spec::from_toml(WEB1, "web1.toml").unwrap();
    assert_eq!((spec.machine.as_str(), spec.accel, spec.serial), ("q35", Accel::Auto, true));
    assert_eq!((spec.disk[0].cache, spec.disk[0].read_only), (DiskCache::None, false));
    assert_eq!((spec.net[0].model, spec.net[0].queues), (NetModel::VirtioNetPci, 1));
    assert_eq!(spec.mac(0), MacAddress::derived("web1", 0));
}

#[test]
fn a_spec_survives_json_and_toml() {
    let spec = Spec::from_toml(WEB1, "web1.toml").unwrap();
    let json = serde_json::to_string(&spec).unwrap();
    assert!(json.contains(r#""memory":"512M""#), "{json}");
    assert_eq!(serde_json::from_str::<Spec>(&json).unwrap(), spec);
    assert_eq!(Spec::from_toml(&toml::to_string(&spec).unwrap(), "again.toml").unwrap(), spec);
}

#[test]
fn errors_name_file_line_and_key() {
    let cases = [
        (
            web1("memory = \"512M\"", "memroy = \"512M\""),
            "web1.toml:2: memroy: isn't known here; did you mean memory?",
        ),
        (web1("memory = \"512M\"\n", ""), "web1.toml:1: memory: is missing; every machine needs it"),
        (
            web1("512M", "512"),
            "web1.toml:2: memory: \"512\" isn't a size; write a whole number with K, M, G or T, such as \"512M\"",
        ),
        (
            web1("\"512M\"", "512"),
            "web1.toml:2: memory: invalid type: integer `512`, expected a size such as \"512M\" or \"2G\"",
        ),
        (web1("512M", "0M"), "web1.toml:2: memory: 0B isn't between 1M and 16T"),
        (
            web1("vcpus = 2", "vcpus = \"two\""),
            "web1.toml:3: vcpus: invalid type: string \"two\", expected u32",
        ),
        (web1("vcpus = 2", "vcpus = 0"), "web1.toml:3: vcpus: 0 isn't between 1 and 1024"),
        (web1("bridge", "brigde"), "web1.toml:6: net[0].brigde: isn't known here; did you mean bridge?"),
        (
            web1("bridge = \"br0\"", "mac = \"52:54:00:00:00:01\""),
            "web1.toml:5: net[0]: needs either bridge or tap: where the card is plugged in",
        ),
        (
            web1("\"qcow2\"", "\"qcow3\""),
            "web1.toml:10: disk[0].format: unknown variant `qcow3`, expected `raw` or `qcow2`",
        ),
        (
            web1("/srv/vm/", "vm/"),
            "web1.toml:9: disk[0].path: vm/web1.qcow2 isn't absolute; write the whole path",
        ),
        (
            web1("path = \"/srv/vm/web1.qcow2\"\n", ""),
            "web1.toml:8: disk[0]: needs a path that QEMU opens, or an image, a size or a file to adopt for a disk that godwit serves",
        ),
        (
            web1("[[disk]]", "[[disk]]\nsize = \"1G\""),
            "web1.toml:10: disk[0].path: stands beside image, size or adopt; either QEMU opens a file, or godwit serves a disk",
        ),
        (
            web1("path = \"/srv/vm/web1.qcow2\"\n", "image = \"../debian\"\n"),
            "web1.toml:9: disk[0].image: \"../debian\" isn't an image's name; see `godwit image ls`",
        ),
        (
            web1("path = \"/srv/vm/web1.qcow2\"\n", "size = \"0M\"\n"),
            "web1.toml:9: disk[0].size: 0 isn't the size of a disk",
        ),
        (
            web1("path = \"/srv/vm/web1.qcow2\"\n", "size = \"1G\"\n"),
            "web1.toml:8: disk[0]: has a format or cache, which are for files that QEMU opens; leave them out",
        ),
        (
            web1("name = \"web1\"", "name = \"Web 1\""),
            "web1.toml:1: name: \"Web 1\" isn't 1 to 63 of a-z, 0-9 and - (the first not -)",
        ),
        (
            web1("vcpus = 2", "extra = [\"-S\"]"),
            "web1.toml:3: extra[0]: -S is godwit's own to set; leave it out",
        ),
        (
            web1("vcpus = 2", "machine = \"microvm\""),
            "web1.toml:3: machine: microvm isn't supported; use q35, pc or one of their versioned types",
        ),
        (
            web1("[[disk]]", "[adopted]\narguments = []\n[[disk]]"),
            "web1.toml:8: adopted: is written by `vm adopt` only; leave it out",
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(error(&text), expected, "{text}");
    }
}

#[test]
fn what_isnt_toml_has_a_line_too() {
    let text = error("name = \"web1\"\nmemory = 512M\n");
    assert!(text.starts_with("web1.toml:2: isn't TOML: "), "{text}");
    assert_eq!(text.lines().count(), 1);
}
