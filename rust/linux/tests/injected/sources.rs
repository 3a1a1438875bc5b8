//! The sources, read: no call of the crate goes past the injection point.

use pagemerge_linux::inject;
use std::collections::BTreeMap;
use std::fs;

/// Goal: no call of the crate goes past the injection point. Method: the sources are read.
///
/// * A call of the C library stands within a few lines below the name of its `Call`. (Not so what cannot
///   fail: see `CANNOT_FAIL`.)
/// * Files and threads of the standard library are used in `sys/files.rs` and `sys/thread.rs` only.
/// * Each name of a call stands at one place, so that a name is a site.
pub(super) fn no_call_goes_past_the_injection_point() {
    const CANNOT_FAIL: [&str; 4] = ["sysconf", "__errno_location", "sigfillset", "sched_yield"];
    const STANDARD: [&str; 9] = [
        "fs::read",
        "fs::metadata",
        "fs::symlink",
        "fs::write",
        "File::open",
        "File::create",
        "Builder::new",
        "std::thread::spawn",
        "Thread::spawn",
    ];
    let mut sites: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut calls = 0;
    for path in sources() {
        let text = fs::read_to_string(&path).expect("a source");
        let name = path
            .to_string_lossy()
            .rsplit_once("/src/")
            .expect("in src")
            .1
            .to_owned();
        // The second is used by `sys/thread.rs` alone, as threads of the standard library would be.
        if name == "sys/inject.rs" || name == "sys/bare.rs" {
            continue;
        }
        let end = text.find("\nmod tests {").unwrap_or(text.len());
        let end = text
            .find("#[cfg(test)]\npub(crate) mod kinds")
            .unwrap_or(end)
            .min(end);
        let lines: Vec<&str> = text[..end].lines().collect();
        for (at, line) in lines.iter().enumerate() {
            let place = format!("{name}:{}", at + 1);
            let code = line.split("//").next().unwrap_or_default();
            for part in code.split("libc::").skip(1) {
                let word: String = part
                    .chars()
                    .take_while(|c| c.is_alphanumeric() || *c == '_')
                    .collect();
                let is_call = part[word.len()..].starts_with('(');
                if !is_call || CANNOT_FAIL.contains(&word.as_str()) || code.contains("SYS_gettid") {
                    continue;
                }
                calls += 1;
                let above = lines[at.saturating_sub(9)..=at].join("\n");
                let routed = ["checked", "numbered"]
                    .iter()
                    .any(|way| above.contains(way));
                assert!(
                    routed,
                    "{place}: libc::{word} goes past the injection point"
                );
            }
            if !["sys/files.rs", "sys/thread.rs"].contains(&name.as_str()) {
                for word in STANDARD {
                    assert!(
                        !code.contains(word),
                        "{place}: {word} belongs in sys/files.rs or sys/thread.rs"
                    );
                }
            }
            for part in code.split("Call::").skip(1) {
                let word: String = part.chars().take_while(|c| c.is_alphanumeric()).collect();
                let only_asks = ["asked(", "run_to_reason("]
                    .iter()
                    .any(|way| code.contains(way));
                if !only_asks && word != "NAMED" && !word.is_empty() {
                    sites.entry(word).or_default().push(place.clone());
                }
            }
        }
    }
    assert!(calls > 30, "the sources were not found");
    for call in inject::calls() {
        let places = sites.get(call).map_or(&[][..], Vec::as_slice);
        // Advice is made into names by a macro.
        let advice = call.starts_with("Madvise");
        assert!(advice || places.len() == 1, "{call} stands at {places:?}");
    }
    println!(
        "figure: {calls} calls of the C library, {} names",
        inject::calls().count()
    );
}

pub(super) fn sources() -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    let mut next = vec![std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    while let Some(directory) = next.pop() {
        for entry in fs::read_dir(directory).expect("the sources").flatten() {
            let path = entry.path();
            if path.is_dir() {
                next.push(path);
            } else if path.extension().is_some_and(|end| end == "rs") {
                found.push(path);
            }
        }
    }
    found
}
