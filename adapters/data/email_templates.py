"""Scenarios, wordings and slot values of the e-mail generator."""

from dataclasses import dataclass

from adapters.data.core import Pool, Vocab
from adapters.data.vocab import AMOUNTS, CITIES, DAYS, NAMES, TIMES


@dataclass(frozen=True)
class Scenario:
    """What an e-mail is about: wordings seen in training, wordings kept back, and the summary."""

    summary: str
    subjects: Pool
    bodies: Pool
    heldout_bodies: Pool


VOCABS = {
    "name": NAMES, "reader": NAMES, "colleague": NAMES, "day": DAYS, "time": TIMES, "amount": AMOUNTS, "city": CITIES,
    "meeting": Vocab(
        ("budget review", "team meeting", "kick-off call", "design workshop", "sales call", "status meeting"),
        ("board meeting", "hiring interview", "safety briefing", "planning session"),
    ),
    "document": Vocab(
        ("signed contract", "quarterly report", "floor plan", "sales figures", "price list", "project plan",
         "travel expenses", "draft brochure"),
        ("audit report", "supplier agreement", "seating plan", "test results"),
    ),
    "reason": Vocab(
        ("a strike at the port", "a missing part", "heavy snow", "a customs check", "a broken machine",
         "staff illness"),
        ("a flooded warehouse", "a power cut", "a late supplier", "a failed inspection"),
    ),
    "goods": Vocab(
        ("new laptops", "office chairs", "printed flyers", "spare parts", "steel pipes", "sample kits"),
        ("conference badges", "solar panels", "kitchen tiles", "training manuals"),
    ),
    "system": Vocab(
        ("mail server", "payroll system", "company website", "phone system", "file share", "booking portal"),
        ("customer database", "video platform", "door access system", "ticket system"),
    ),
    "service": Vocab(
        ("office cleaning", "web hosting", "the printer lease", "legal advice", "the catering", "the van hire"),
        ("translation work", "the alarm system", "garden care", "the photo licence"),
    ),
    "event": Vocab(
        ("a farewell party", "the summer picnic", "a product demo", "a charity run", "the opening night",
         "a team lunch"),
        ("a book launch", "the harvest dinner", "a bowling evening", "the science fair"),
    ),
    "help": Vocab(
        ("fixing the projector", "covering the late shift", "reviewing the slides", "finding the missing files",
         "showing the guests around"),
        ("translating the leaflet", "repairing the scanner", "hosting the trainees"),
    ),
    "choice": Vocab(
        ("the new logo", "the venue", "the insurance plan", "the paint colour", "the software supplier"),
        ("the caterer", "the uniform design", "the delivery firm"),
    ),
    "team": Vocab(
        ("marketing", "support", "finance", "research", "logistics", "design"),
        ("legal", "purchasing", "quality", "data"),
    ),
    "need": Vocab(
        ("a hotel room", "a rental car", "a desk for two days", "a visitor pass", "a taxi from the airport"),
        ("a parking space", "an interpreter", "a meeting room"),
    ),
    "project": Vocab(
        ("website relaunch", "warehouse move", "customer survey", "app update", "spring campaign"),
        ("kitchen renovation", "archive project", "heating upgrade"),
    ),
    "saving": Vocab(
        ("the travel budget", "the second workshop", "outside consultants", "the printed catalogue"),
        ("the launch video", "weekend shifts", "the prize draw"),
    ),
    "fault": Vocab(
        ("the meeting room is too cold", "the coffee machine leaks", "the lift is stuck again",
         "the parking garage is always full", "the new chairs squeak"),
        ("the lights in the hall flicker", "the bike shed is locked too early", "the canteen queue is too long"),
    ),
    "course": Vocab(
        ("first-aid course", "security training", "Spanish class", "spreadsheet workshop", "fire drill briefing"),
        ("public speaking course", "data protection training", "forklift class"),
    ),
    "thing": Vocab(
        ("a grey scarf", "a set of keys", "a phone charger", "an umbrella"),
        ("a silver ring", "a red notebook", "a pair of glasses"),
    ),
    "place": Vocab(
        ("the second floor", "the main hall", "the north building", "the canteen"),
        ("the library", "the old annex", "the east wing"),
    ),
}  # fmt: skip

SCENARIOS = (
    Scenario(
        "{name} wants to move the {meeting} from {day} to {day2} at {time}.",
        ("{meeting}", "Change of date", "New slot for the {meeting}"),
        ("Something has come up and I can't make the {meeting} on {day}. Could we do {day2} at {time} instead?",
         "I'm afraid {day} no longer works for the {meeting}. {day2}, {time} would be perfect for me.",
         "Would it be possible to move the {meeting}, currently planned for {day}? I'd suggest {day2} at {time}."),
        ("My calendar just filled up: {day} is gone, so the {meeting} has to wait. Does {day2}, {time} suit you?",),
    ),
    Scenario(
        "{name} asks for the {document} by {day}.",
        ("{document}", "Missing paper", "Small request"),
        ("Could you send me the {document} by {day}? I need it for the file.",
         "I still don't have the {document}. Please let me have it no later than {day}.",
         "We are putting everything together and only the {document} is missing. It has to be here by {day}."),
        ("Has the {document} got lost somewhere? I was counting on it. {day} is the last moment I can wait for.",),
    ),
    Scenario(
        "{name} reminds you to pay the {amount} invoice for {service} by {day}.",
        ("Payment reminder", "Open invoice", "Your account"),
        ("According to our books, the invoice over {amount} for {service} is still open. Please pay it by {day}.",
         "We have not received your payment of {amount} for {service}. Kindly transfer the sum by {day}.",
         "A gentle reminder: {amount} for {service} is due. We would be grateful for payment by {day}."),
        ("It may have slipped your mind, but {service} has not been paid for. The bill was {amount}; pay till {day}.",),
    ),
    Scenario(
        "{name} reports that the {goods} are delayed until {day} because of {reason}.",
        ("Delivery", "Your order", "Delay of the {goods}"),
        ("Bad news: because of {reason}, the {goods} won't arrive before {day}. We are sorry for the trouble.",
         "The delivery of the {goods} is running late due to {reason}. The new date is {day}.",
         "We had to deal with {reason} and could not ship the {goods} in time. Expect them on {day}."),
        ("You are waiting for the {goods}, I know. They got held up by {reason} and will only reach you on {day}.",),
    ),
    Scenario(
        "{name} is ill until {day}; {colleague} takes over the {project}.",
        ("Out of office", "Sick leave", "{project}"),
        ("The doctor has told me to stay in bed until {day}. {colleague} will look after the {project} meanwhile.",
         "I've caught the flu and won't be back before {day}. For the {project}, please talk to {colleague}.",
         "I am on sick leave until {day}. {colleague} has agreed to run the {project} while I am away."),
        ("My fever is not going down, so don't expect me before {day}. I've briefed {colleague} on the {project}.",),
    ),
    Scenario(
        "{name} announces that the {system} will be down on {day} from {time}.",
        ("Maintenance", "Planned downtime", "{system}"),
        ("We will update the {system} on {day}. It will not be available from {time} on.",
         "Please note that the {system} is going offline on {day} at {time} for maintenance.",
         "From {time} on {day}, nobody will be able to use the {system}, since we are replacing hardware."),
        ("Save your work in good time: on {day} at {time} we switch off the {system} for repairs.",),
    ),
    Scenario(
        "{name} invites you to {event} on {day} at {time}.",
        ("Invitation", "You're invited", "Save the date"),
        ("We are planning {event} and would love to have you there. It starts on {day} at {time}.",
         "Would you like to come to {event}? We meet on {day}, {time}, and there will be snacks.",
         "You are warmly invited to {event}, which takes place on {day} at {time}."),
        ("Keep {day} free! From {time} there is {event}, and it would not be the same without you.",),
    ),
    Scenario(
        "{name} thanks you for {help}.",
        ("Thank you", "Great work", "Thanks again"),
        ("I wanted to say thank you for {help}. You really saved my day.",
         "You were such a help by {help}. I owe you a coffee!",
         "Everyone was impressed with you {help} at such short notice. Thank you so much."),
        ("Not many people would have spent their evening {help}. I really appreciate it.",),
    ),
    Scenario(
        "{name} needs a decision on {choice} by {day}.",
        ("Decision needed", "Your opinion", "{choice}"),
        ("We have to settle {choice}. Please tell me by {day} which option you prefer.",
         "The question of {choice} is still open, and I must give an answer by {day}. What do you think?",
         "I've attached three options for {choice}. Can you decide by {day}?"),
        ("We've gone round in circles about {choice} long enough. Pick one of the proposals before {day}, please.",),
    ),
    Scenario(
        "{name} announces that {colleague} joins the {team} team on {day}.",
        ("New colleague", "Welcome {colleague}", "News from the {team} team"),
        ("I'm happy to tell you that {colleague} will start in the {team} team on {day}.",
         "From {day}, {colleague} will be working with us in the {team} team. Please say hello!",
         "The {team} team is growing: {colleague} is joining us on {day}."),
        ("Our search is over. {colleague} has signed and will strengthen the {team} team as of {day}.",),
    ),
    Scenario(
        "{name} arrives in {city} on {day} at {time} and needs {need}.",
        ("Travel plans", "My visit", "Trip to {city}"),
        ("I will be landing in {city} on {day} at {time}. Could you arrange {need} for me?",
         "My train gets to {city} on {day} at {time}. It would be great if you could organise {need}.",
         "I'm coming to {city} on {day}, arriving at {time}. I will need {need}."),
        ("Everything is booked: {city}, {day}, {time}. The only thing I haven't got yet is {need}. Can you help?",),
    ),
    Scenario(
        "{name} says the {project} is {amount} over budget and suggests cutting {saving}.",
        ("Costs", "Budget", "{project}"),
        ("The {project} has cost {amount} more than planned. I think we should cut {saving}.",
         "I've checked the numbers: we are {amount} over budget on the {project}. We could drop {saving}.",
         "The {project} is getting expensive, {amount} above plan. My proposal is to do without {saving}."),
        ("Have you seen the bills for the {project}? They exceed the plan by {amount}. Without {saving} we'd manage.",),
    ),
    Scenario(
        "{name} complains that {fault} and wants it fixed by {day}.",
        ("Complaint", "This can't go on", "Building"),
        ("I have to complain: {fault}. Please get it fixed by {day}.",
         "Several people have told me that {fault}. This should be solved by {day}.",
         "Once again {fault}. I expect someone to take care of it by {day}."),
        ("Nobody seems to care that {fault}. If nothing has changed by {day}, I'll write to the director.",),
    ),
    Scenario(
        "{name} asks you to sign up for the {course} by {day}.",
        ("{course}", "Registration", "Last places"),
        ("There are a few places left in the {course}. Please register by {day}.",
         "Everyone should take part in the {course} this year. Sign up by {day}.",
         "Your name is not yet on the list for the {course}. The deadline for signing up is {day}."),
        ("The {course} is filling up fast. Anyone who hasn't put their name down by {day} will miss out, so hurry.",),
    ),
)  # fmt: skip

HELDOUT_SCENARIOS = (
    Scenario(
        "{name} lost {thing} in {place} and asks you to look for it.",
        ("Lost property", "Have you seen it?"),
        (),
        ("I must have left {thing} in {place} yesterday. Could you have a look whether it is still there?",
         "Since this morning I've been missing {thing}. I was last in {place}. Would you check for me?"),
    ),
    Scenario(
        "{name} is looking for helpers for {event} on {day}.",
        ("Helpers wanted", "Lend a hand"),
        (),
        ("We need a few more people to help with {event} on {day}. Can you spare an hour?",
         "{event} on {day} won't run itself. If you can set up tables or hand out drinks, please let me know."),
    ),
    Scenario(
        "{name} announces that the price for {service} rises to {amount} on {day}.",
        ("Price change", "New rates"),
        (),
        ("As costs have gone up, {service} will cost {amount} from {day} on. We hope for your understanding.",
         "We have to adjust our rates. The new price for {service} is {amount}, starting on {day}."),
    ),
    Scenario(
        "{name} announces that the {team} team moves to {place} on {day}.",
        ("Moving", "New rooms"),
        (),
        ("On {day} the {team} team is packing its boxes. From then on you will find us in {place}.",
         "Please note our new location: the {team} team will be in {place} from {day}."),
    ),
)  # fmt: skip

NOISE = Vocab(
    ("By the way, the canteen has a new menu.", "The weather here is awful.", "My phone is off today.",
     "Please excuse any typing errors.", "I am writing from the train.", "The kids say hello.",
     "Let me know if you have questions.", "No need to print this.", "I have copied the team in.",
     "You can reach me at extension 214."),
    ("The garden is finally in bloom.", "I'm at the dentist until lunch.", "Sorry about the loud hold music earlier.",
     "The printer on our floor works again, by the way.", "My direct line has changed to 377."),
)  # fmt: skip
