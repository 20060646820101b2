"""Sentence frames of the prose generator, grouped by what a sentence does in its paragraph.

`{slot}` is filled from a domain (see `prose`), `{Slot}` is the same with a capital; names and town are fixed
for one piece, all other slots are dealt anew for every sentence.
"""

OPENING = (
    "{Name}, {a_expert} from {town}, has spent {n_years} years {doing}, and has never regretted it.",
    "In {town}, {field} is not a hobby but a way of dividing up the year.",
    "Anyone who visits {place} on a {weekday} morning will find {name} {doing}.",
    "There are two opinions about {field} in {town}, and {name} has held both of them.",
    "When {name} first came to {place}, in {year}, nobody there thought that it would last.",
    "The story of {field} in {town} begins with {cause}.",
    "Most visitors to {place} ask the same question: {why}.",
    "For a long time the people of {town} took {things} for granted.",
    "It was in {month} {year} that {people} at {place} first began to worry about {stuff}.",
    "Of all the {things} at {place}, the oldest is also the one that gives the least trouble.",
    "{Surname} keeps a notebook for every year of {field}, and the one for {year} is the thickest.",
    "Few subjects divide {people} as reliably as {stuff}.",
    "Last {month} I travelled to {town} to learn {why}.",
    "{People} in this part of the country have an old saying: {truth}.",
    "Nobody in {town} can remember a {month} like this one.",
    "What do {people} talk about when there is no work? In {town}, they talk about {stuff}.",
)

GENERAL = (
    "{Truth}.",
    "As a rule, {truth}.",
    "{People} know that {truth}.",
    "It helps to remember that {truth}.",
    "The first thing that a newcomer learns is that {truth}.",
    "Although {truth}, few beginners believe it until they have seen it for themselves.",
    "If {truth}, then it also follows that care taken early is never wasted.",
    "The textbooks say that {truth}; at {place}, they would put it less politely.",
    "{Truth}, and no amount of good advice will change that.",
    "One can argue about the details, but {truth}.",
    "To understand {why}, it is enough to know that {truth}.",
    "Every {expert} will tell you that {truth}, and most of them learned it by accident.",
    "Where {things} are concerned, {truth}.",
)

EVENT = (
    "In {year}, after {cause}, {event}.",
    "{Event}, and for {duration} nobody could {act}.",
    "Then, one {weekday} in {month}, {event}.",
    "The trouble began with {cause}: {event}.",
    "Because of {cause}, {surname} {did} a week later than planned.",
    "That same {season}, {event}, which surprised even the oldest {folk}.",
    "While {name} was {doing}, {event}.",
    "Twice in {duration}, {event}.",
    "By the end of {month}, {surname} had already {seen} {number} {things}, and it was still not enough.",
    "{Other}, who {did} that day, remembers that {event}.",
    "Nobody could say whether it was {cause} or simply bad luck, but {event}.",
    "First, {event}; then, before anyone could {act}, the telephone rang.",
    "After {duration} of waiting, they {did} without being asked.",
    "It was {cause} that finally persuaded them to {act}.",
    "Some blamed {cause}, others blamed {cause}.",
)

FIGURE = (
    "In {year}, {subject} was {figure}; ten years later it had reached {figure2}.",
    "According to the records, {subject} rose from {figure} in {month} to {figure2} the following {month2}.",
    "{Subject} now stands at {figure}, which {surname} considers a reasonable number.",
    "On paper, {subject} came to {figure}. In practice it was closer to {figure2}.",
    "The figures are plain enough: {subject} fell from {figure2} to {figure} within {duration}.",
    "A survey of {number} {things} put {subject} at {figure}, give or take a little.",
    "When {other} added everything up, {subject} turned out to be {figure}, and not {figure2} as reported.",
)

VOICE = (
    '"{Truth}," says {surname}. "{Advice}."',
    '"I was told to {act}," {other} recalls, "so I did, and {event}."',
    '"{Advice}," {surname} tells everyone who asks, and a good many who do not.',
    '"People always want to know {why}," says {name}, "and I tell them that {truth}."',
    'When I asked {other} about {cause}, {shehe} laughed. "{Truth}," {shehe} said. "You get used to it."',
    "{Surname} answered that {truth}, and went on {doing}.",
    '"Was it worth it?" I asked. {Surname} thought about {cause}, and about the day when {event}. '
    '"Ask me again in {month}," {shehe} said.',
    "{Other} disagrees. In h{er} view, {truth}.",
    '"We spent {duration} {doing}," one of the {folk} told me, "and in the end {event}."',
    '"You can {act}, or you can wait," said {other}. "I have tried both."',
)

CONTRAST = (
    "Still, {truth}.",
    "And yet {truth}.",
    "Not everyone agrees. Some {folk} insist that {truth}.",
    "On the other hand, {cause} can undo a whole season of work.",
    "Elsewhere the opposite happened: {event}.",
    "This does not explain {why}.",
    "A stranger might conclude that it is all a matter of {stuff}, but {truth}.",
    "None of this would matter if it were not for {cause}.",
    "The difficulty is that nobody has found out {why}.",
)

CLOSING = (
    "In the end it comes down to patience, because {truth}.",
    "Whether that will be enough, nobody in {town} can say.",
    "Next {month} they mean to {act} again.",
    "{Name} has no plans to stop. {Advice}, {shehe} says, and the rest follows.",
    "It is a small thing, but small things are what {field} is made of.",
    "Perhaps that is the real answer to the question of {why}.",
    "Since then, {surname} has {done} every {month}, whatever the weather.",
    "The {things} are still there, and so is {surname}.",
    "For now, the people of {town} are content to wait.",
)

HEADINGS = (
    "A year of {field} in {town}",
    "What {people} know",
    "Notes from {town}",
    "The question of {stuff}",
    "After {cause}",
    "{Name} and the {things}",
    "Learning to {act}",
    "Why it still matters",
    "The {month} report",
    "Lessons from {year}",
)

LETTER_OPENINGS = (
    "Dear {reader},",
    "My dear {reader},",
    "Dear {reader}, I hope that this finds you well.",
)
LETTER_BODIES = (
    "I am writing from {town}, where I have been {doing} with {other} since {weekday}.",
    "You asked me {why}. I have thought about it for {duration}, and I am not much wiser.",
    "There is a good deal of news. To begin with, {event}.",
    "Do you remember {surname}? {SheHe} is at {place} now, and sends you h{er} best wishes.",
    "I ought to have written sooner, but {event}, and after that there was no time.",
    "Please tell the others that {truth}; they will not believe it from me.",
    "If you come in {month}, bring a coat, and we shall {act} together.",
)
LETTER_ENDINGS = ("With love from all of us,\n{writer}", "Yours, as ever,\n{writer}", "Write soon.\n{writer}")

DIARY = (
    "{Event}. Spent the rest of the day {doing}.",
    "{Other} came by in the afternoon and we {did}. {Truth}, {shehe} says.",
    "Rain until noon. {Subject}: {figure}. I had hoped for {figure2}.",
    "Tried to {act} alone and gave up after {duration}.",
    "A bad day, thanks to {cause}. Tomorrow I shall {act}.",
    "Nothing much to report, except that {event}.",
    "Slept badly, thinking about {why}. Got up early and {did}.",
    "{Surname} is still worried about {cause}. I told h{im} that {truth}.",
)

QUESTIONS = (
    "Is it true that {truth}?",
    "Do I need to {act} every year?",
    "What should I do after {cause}?",
    "Can you explain {why}?",
    "How much attention should I pay to {stuff}?",
)
ANSWERS = (
    "In most cases, yes. {Advice}. {People} in {town} have done so for {duration}, and {truth}.",
    "Not necessarily. {Truth}, and much depends on {stuff}. When in doubt: {tip}.",
    "It depends on the {things}. If you have had {cause}, then {tip}. Otherwise there is no hurry.",
    "Opinions differ. {Name}, {a_expert}, would say that {truth}. {Advice}, and see what happens.",
    "Briefly: {tip}. In {year} a reader did the opposite, and {event}.",
)
