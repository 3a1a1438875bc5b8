//! `docs/safety.md` against the sources: every `unsafe` outside of tests is in its inventory, with its
//! number, and every test that it names exists.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn document() -> String {
    fs::read_to_string(root().join("docs/safety.md")).expect("docs/safety.md")
}

/// The part of the document under a heading of the second level.
fn section<'a>(document: &'a str, heading: &str) -> &'a str {
    let (_, rest) = document
        .split_once(&format!("\n## {heading}\n"))
        .unwrap_or_else(|| panic!("there is no heading {heading:?}"));
    rest.split_once("\n## ").map_or(rest, |(part, _)| part)
}

/// All files with a name that ends in `.rs` below a folder.
fn sources(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|end| end == "rs") {
            into.push(path);
        }
    }
}

/// What is in backticks.
fn quoted(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// How many times a line opens a block, or declares something, that is unsafe.
fn unsafe_in(code: &str) -> usize {
    code.match_indices("unsafe")
        .filter(|(at, word)| {
            let before = code[..*at].chars().next_back();
            let after = code[at + word.len()..].trim_start();
            !before.is_some_and(is_name)
                && ["{", "fn ", "impl ", "impl<", "extern ", "trait "]
                    .iter()
                    .any(|next| after.starts_with(next))
        })
        .count()
}

/// The name of the function that a line begins, if it does.
fn function_in(code: &str) -> Option<&str> {
    let at = code.find("fn ")?;
    if code[..at].chars().next_back().is_some_and(is_name) {
        return None;
    }
    let rest = &code[at + 3..];
    let end = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
    (end > 0).then(|| &rest[..end])
}

/// Blocks and declarations by the function above which they are not, tests left out.
fn inventory_of(text: &str) -> BTreeMap<String, usize> {
    let mut found = BTreeMap::new();
    let mut function = "the file itself";
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        if line.trim() == "#[cfg(test)]" {
            while lines
                .peek()
                .is_some_and(|line| line.trim_start().starts_with("#["))
            {
                // An attribute may have several lines.
                lines.by_ref().find(|line| line.trim_end().ends_with(']'));
            }
            let item = lines.peek().copied().unwrap_or_default();
            let is_module = item.trim_start().starts_with("mod ") || item.contains(" mod ");
            if is_module && !item.trim_end().ends_with(';') {
                // rustfmt puts the closing brace where the item began.
                let indent = item.len() - item.trim_start().len();
                let end = format!("{}}}", " ".repeat(indent));
                lines.by_ref().find(|line| *line == end);
            }
            continue;
        }
        let code = line.split("//").next().unwrap_or_default();
        function = function_in(code).unwrap_or(function);
        let count = unsafe_in(code);
        if count > 0 {
            *found.entry(function.to_owned()).or_insert(0) += count;
        }
    }
    found
}

#[test]
fn every_unsafe_is_in_the_inventory_and_the_numbers_are_right() {
    let document = document();
    // By file: each row's functions and number.
    let mut rows: BTreeMap<&str, Vec<(BTreeSet<&str>, usize)>> = BTreeMap::new();
    for line in section(&document, "Where `unsafe` is").lines() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        if cells.len() == 7 && cells[1].starts_with("`rust/") {
            let number = cells[3].parse().expect("a number in the third column");
            let functions = quoted(cells[2]).into_iter().collect();
            rows.entry(quoted(cells[1])[0])
                .or_default()
                .push((functions, number));
        }
    }
    assert!(rows.len() > 10, "the table was not found");

    let root = root();
    let mut wrong = Vec::new();
    let mut seen = BTreeSet::new();
    for part in ["alloc", "core", "linux", "py", "sim"] {
        let mut files = Vec::new();
        sources(&root.join("rust").join(part).join("src"), &mut files);
        for file in files {
            let text = fs::read_to_string(&file).expect("a source file");
            let found = inventory_of(&text);
            let path = file.strip_prefix(&root).expect("below the root");
            let path = path.to_str().expect("our names are plain").to_owned();
            let none = Vec::new();
            let listed = rows.get(path.as_str()).unwrap_or(&none);
            if !found.is_empty() {
                seen.insert(path.clone());
            }
            for (functions, number) in listed {
                let real: usize = functions
                    .iter()
                    .map(|&name| found.get(name).copied().unwrap_or(0))
                    .sum();
                if real != *number {
                    wrong.push(format!("{path}: {functions:?} have {real}, not {number}"));
                }
                for name in functions.iter().filter(|&&name| !found.contains_key(name)) {
                    wrong.push(format!("{path}: {name} has none"));
                }
            }
            for (name, number) in &found {
                let in_rows = listed
                    .iter()
                    .filter(|(functions, _)| functions.contains(name.as_str()))
                    .count();
                if in_rows != 1 {
                    wrong.push(format!(
                        "{path}: {name} ({number}) is in {in_rows} rows, not 1"
                    ));
                }
            }
        }
    }
    for path in rows.keys().filter(|path| !seen.contains(**path)) {
        wrong.push(format!("{path} has no unsafe code, or is not there"));
    }
    assert!(
        wrong.is_empty(),
        "docs/safety.md, \"Where `unsafe` is\", is not what the sources are:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn every_test_that_the_document_names_exists() {
    let document = document();
    let promised = section(&document, "What is promised, and which test holds it");
    let root = root();
    let mut named = 0;
    let mut missing = Vec::new();
    for line in promised.lines().filter(|line| line.starts_with("| ")) {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let tests = quoted(cells[2]);
        let is_head = cells[1] == "promise";
        if tests.is_empty() && !is_head {
            missing.push(format!("no test holds {:?}", cells[1]));
        }
        for test in tests {
            named += 1;
            let Some((file, name)) = test.split_once("::") else {
                missing.push(format!("{test} does not say where it is"));
                continue;
            };
            let places = [
                format!("rust/linux/tests/{file}.rs"),
                format!("rust/core/tests/{file}.rs"),
                format!("rust/sim/tests/{file}.rs"),
                format!("rust/alloc/tests/{file}.rs"),
                format!("rust/linux/src/{file}.rs"),
                format!("rust/linux/src/sys/{file}.rs"),
                format!("rust/linux/src/space/{file}.rs"),
                format!("tests/{file}.py"),
                format!("fuzz/tests/{file}.rs"),
            ];
            // A test of several files counts as one.
            let mut parts = Vec::new();
            let folder = root.join(format!("rust/linux/tests/{file}"));
            if folder.is_dir() {
                sources(&folder, &mut parts);
            }
            let whole: String = parts
                .iter()
                .map(|part| fs::read_to_string(part).expect("a source file"))
                .collect();
            let alone = places
                .iter()
                .map(|place| fs::read_to_string(root.join(place)).unwrap_or_default());
            let exists = alone.chain([whole]).any(|text| {
                let is_rust = text.contains(&format!("fn {name}("));
                // A test with a harness of its own has to be in its list, too.
                let listed = !text.contains("support::run(vec![")
                    || text.contains(&format!("case!({name})"));
                is_rust && listed || text.contains(&format!("def {name}("))
            });
            if !exists {
                missing.push(format!("{test} is not there"));
            }
        }
    }
    assert!(named > 30, "the tables were not found");
    assert!(
        missing.is_empty(),
        "docs/safety.md, \"What is promised\":\n{}",
        missing.join("\n")
    );
}

/// The parts above are no good if they find nothing.
#[test]
fn inventory_finds_what_it_is_to_find() {
    let text = "\
unsafe impl Send for X {}
impl X {
    // unsafe { in a comment }
    pub(crate) unsafe fn one(&self) {
        unsafe { two() }; unsafe { three() }
    }

    #[allow(unsafe_code)]
    fn other() {
        let x = unsafe {
            four()
        };
    }
}

#[cfg(test)]
#[allow(
    unsafe_code,
)]
mod tests {
    fn inner() {
        unsafe { five() }
    }
}

#[cfg(test)]
mod elsewhere;

fn last() {
    not_unsafe();
    unsafe { six() }
}
";
    let found: Vec<(String, usize)> = inventory_of(text).into_iter().collect();
    let wanted = [
        ("last", 1),
        ("one", 3),
        ("other", 1),
        ("the file itself", 1),
    ];
    assert_eq!(
        found,
        wanted.map(|(name, number)| (name.to_owned(), number))
    );
}
